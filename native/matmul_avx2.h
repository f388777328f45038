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
constexpr bool HAS_PAIRS = true; // there is pair_up
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
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

// 8 dwords of each of 16 rows, as `load(row)` gives them, to 8 columns of 16 dwords.
template <class Load> void transpose_rows(Load load, char *columns) {
    for (int first = 0; first < 16; first += 8, columns += 32) {
        __m256i r[8], t[8];
        for (int i = 0; i < 8; ++i)
            r[i] = load(first + i);
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
            auto *to = reinterpret_cast<__m256i *>(columns + i * 64);
            _mm256_store_si256(to, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
            _mm256_store_si256(to + 8, _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
        }
    }
}

// Of each of 16 rows the 8 dwords that begin `at` bytes after its pointer, to 8 columns of 16 dwords.
inline void transpose8(const char *const *rows, size_t at, char *columns) {
    transpose_rows([=](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows[i] + at)); }, columns);
}
// The same with 8 numbers of 16 bits in each row, which become floats.
inline void transpose8_f16(const char *const *rows, size_t at, char *columns) {
    transpose_rows(
        [=](int i) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + at));
            return _mm256_castps_si256(_mm256_cvtph_ps(halves));
        },
        columns);
}
inline void transpose8_bf16(const char *const *rows, size_t at, char *columns) {
    transpose_rows(
        [=](int i) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + at));
            return _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
        },
        columns);
}

// Of each of 16 rows 4 dwords, to 4 columns.
inline void transpose4(const char *const *rows, size_t at, char *columns) {
    for (int half = 0; half < 2; ++half, rows += 8, columns += 32) {
        __m256i r[4];
        for (int i = 0; i < 4; ++i) {
            const auto *low = reinterpret_cast<const __m128i *>(rows[i] + at);
            const auto *high = reinterpret_cast<const __m128i *>(rows[i + 4] + at);
            r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
        }
        const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
        const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        auto *to = reinterpret_cast<__m256i *>(columns);
        _mm256_store_si256(to, _mm256_unpacklo_epi64(a, c));
        _mm256_store_si256(to + 2, _mm256_unpackhi_epi64(a, c));
        _mm256_store_si256(to + 4, _mm256_unpacklo_epi64(b, d));
        _mm256_store_si256(to + 6, _mm256_unpackhi_epi64(b, d));
    }
}

// Each byte of x, which is below 16, replaced by that number of the table.
template <class Bytes> Bytes look_up(const int8_t *table, const Bytes &x) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
    return Bytes(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), __m256i(x)));
}
// In each lane four copies of its byte number `i`.
template <class Bytes> Bytes copy_byte(const Bytes &x, int i) {
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, //
                                           0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    return Bytes(_mm256_shuffle_epi8(__m256i(x), _mm256_add_epi8(first, _mm256_set1_epi8(char(i)))));
}
// 16 floats of the lower, or higher, 16 bits of as many dwords.
inline void packed_halves(__m256i low, __m256i high, float *to) {
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    _mm256_storeu_ps(to + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
}
inline void low_halves(const uint32_t *x, float *to) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    packed_halves(_mm256_and_si256(load_ints(x), mask), _mm256_and_si256(load_ints(x + 8), mask), to);
}
inline void high_halves(const uint32_t *x, float *to) {
    packed_halves(_mm256_srli_epi32(load_ints(x), 16), _mm256_srli_epi32(load_ints(x + 8), 16), to);
}

} // namespace
