// Vectors of 16 lanes, for AVX-512 (F and BW). With VNNI, products of bytes are summed by one instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace {

using Ints = __m512i;
using Floats = __m512;

constexpr int LANES = 16;
constexpr int ROWS_OF_INTS = 8;
constexpr int ROWS_OF_FLOATS = 12;
constexpr bool WEIGHTS_ARE_UNSIGNED = true; // in dot_bytes and pair_up
constexpr bool HAS_PAIRS = true; // there is pair_up
#if defined(__AVX512VNNI__)
constexpr bool HAS_DOT_BYTES = true;
#else
constexpr bool HAS_DOT_BYTES = false;
#endif

inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const void *p) { return _mm512_load_si512(p); }
inline Ints all_lanes(const void *p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}
// matmul_avx2.h says why. Where AVX-512 is only emulated, there are no such registers.
inline void settle(Ints &x) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(x));
#else
    (void) x;
#endif
}
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

// sum + the four products of bytes in each lane
inline Ints dot_bytes(Ints sum, Ints weights, Ints activations) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, weights, activations);
#else
    (void) weights, (void) activations;
    return sum;
#endif
}
// sum + the two products of 16-bit words in each lane
inline Ints dot_words(Ints sum, Ints weights, Ints activations) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(weights, activations));
}
// Two sums of 16 bits in each lane, of two products of bytes each.
inline Ints pair_up(Ints weights, Ints activations) { return _mm512_maddubs_epi16(weights, activations); }
inline Ints add_pairs(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints sum_pairs(Ints pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }

inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
inline void store_floats(float *p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats all_lanes(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }

// Of each of 16 rows 4 dwords, in four columns of 16 dwords. Rows are loaded so that each quarter of a vector has one:
// what transposes 4 x 4 dwords within a quarter then gives whole columns.
struct Columns4 {
    __m512i x[4];
};
inline Columns4 columns4(const char *const *rows, size_t at) {
    const auto row = [=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + at)); };
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(i)), row(i + 4), 1);
        r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], row(i + 8), 2), row(i + 12), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    return {{_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
             _mm512_unpackhi_epi64(b, d)}};
}

// Of each of 16 rows the 4 dwords that begin `at` bytes after its pointer, to 4 columns of 16 dwords.
inline void transpose4(const char *const *rows, size_t at, char *columns) {
    const Columns4 of_dwords = columns4(rows, at);
    for (int i = 0; i < 4; ++i)
        _mm512_store_si512(columns + i * 64, of_dwords.x[i]);
}
inline void transpose8(const char *const *rows, size_t at, char *columns) {
    transpose4(rows, at, columns);
    transpose4(rows, at + 16, columns + 4 * 64);
}
// The same with 8 numbers of 16 bits in each row, which become floats. A dword has two of them.
inline void transpose8_f16(const char *const *rows, size_t at, char *columns) {
    const Columns4 of_pairs = columns4(rows, at);
    for (int i = 0; i < 4; ++i) {
        const __m256i even = _mm512_cvtepi32_epi16(of_pairs.x[i]);
        const __m256i odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32(of_pairs.x[i], 16));
        _mm512_store_ps(columns + i * 128, _mm512_cvtph_ps(even));
        _mm512_store_ps(columns + i * 128 + 64, _mm512_cvtph_ps(odd));
    }
}
inline void transpose8_bf16(const char *const *rows, size_t at, char *columns) {
    const Columns4 of_pairs = columns4(rows, at);
    for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(columns + i * 128, _mm512_slli_epi32(of_pairs.x[i], 16));
        _mm512_store_si512(columns + i * 128 + 64, _mm512_and_si512(of_pairs.x[i], _mm512_set1_epi32(int(0xffff0000))));
    }
}

// Each byte of x, which is below 16, replaced by that number of the table.
template <class Bytes> Bytes look_up(const int8_t *table, const Bytes &x) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
    return Bytes(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), __m512i(x)));
}
// In each lane four copies of its byte number `i`.
template <class Bytes> Bytes copy_byte(const Bytes &x, int i) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    return Bytes(_mm512_shuffle_epi8(__m512i(x), _mm512_add_epi8(first, _mm512_set1_epi8(char(i)))));
}
// 16 floats of the lower, or higher, 16 bits of as many dwords.
inline void low_halves(const uint32_t *x, float *to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(load_ints(x))));
}
inline void high_halves(const uint32_t *x, float *to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(load_ints(x), 16))));
}

} // namespace
