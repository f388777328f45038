// Vectors of 8 lanes, for AVX2 with FMA. With AVX-VNNI, products of bytes are summed by one instruction.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace {

using Ints = __m256i;
using Floats = __m256;

constexpr int LANES = 8;
constexpr int ROWS_OF_INTS = 3;   // rows that are multiplied with a tile at once: what 16 registers hold
constexpr int ROWS_OF_FLOATS = 4; // also 4 x 2 chains of additions, enough to hide how long each takes
constexpr bool WEIGHTS_ARE_UNSIGNED = true; // in dot_bytes and pair_up
#if defined(__AVXVNNI__)
constexpr bool HAS_DOT_BYTES = true;
#else
constexpr bool HAS_DOT_BYTES = false;
#endif

inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Ints load_ints(const void *p) { return _mm256_load_si256(static_cast<const __m256i *>(p)); }
inline Ints all_lanes(const void *p) { return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float *>(p))); }
// Computes x here and now. GCC would compute all products first and add them up later, which takes more registers than
// there are.
inline void settle(Ints &x) { asm volatile("" : "+x"(x)); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }

// sum + the four products of bytes in each lane
inline Ints dot_bytes(Ints sum, Ints weights, Ints activations) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, weights, activations);
#else
    (void) weights, (void) activations;
    return sum;
#endif
}
// sum + the two products of 16-bit words in each lane
inline Ints dot_words(Ints sum, Ints weights, Ints activations) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, activations));
}
// Two sums of 16 bits in each lane, of two products of bytes each.
inline Ints pair_up(Ints weights, Ints activations) { return _mm256_maddubs_epi16(weights, activations); }
inline Ints add_pairs(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
inline Ints sum_pairs(Ints pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

inline Floats no_floats() { return _mm256_setzero_ps(); }
inline Floats load_floats(const float *p) { return _mm256_loadu_ps(p); }
inline void store_floats(float *p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats all_lanes(float x) { return _mm256_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

// 8 rows of 8 dwords, `stride` bytes apart, to 8 columns, 64 bytes apart.
inline void transpose_half(const char *rows, size_t stride, char *out) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; ++i)
        r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows + i * stride));
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + i * 64), _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + (i + 4) * 64),
                           _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
    }
}

// 16 rows of 8 dwords, `stride` bytes apart, to 8 columns of 16.
inline void transpose(const void *rows, size_t stride, void *out) {
    transpose_half(static_cast<const char *>(rows), stride, static_cast<char *>(out));
    transpose_half(static_cast<const char *>(rows) + 8 * stride, stride, static_cast<char *>(out) + 32);
}

// Bytes with signs, four in a lane, to words: first and third of each lane, then second and fourth.
inline void widen(Ints bytes, Ints &even, Ints &odd) {
    even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    odd = _mm256_srai_epi16(bytes, 8);
}
inline void store_ints(void *p, Ints x) { _mm256_store_si256(static_cast<__m256i *>(p), x); }
inline Ints flip_signs(Ints bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(char(0x80))); }

} // namespace
