// Vectors of 4 lanes, for every x86-64. Before SSSE3, there are only products of words: codes become words.
#pragma once

#include "ggml-impl.h"
#include "matmul_halves.h"
#include "simd-mappings.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace {

using Ints = __m128i;
using Floats = __m128;

constexpr int LANES = 4;
constexpr int ROWS_OF_INTS = 1; // a second one would gain nothing: instructions overwrite one of their operands
constexpr int ROWS_OF_FLOATS = 2;
constexpr bool WEIGHTS_ARE_UNSIGNED = true; // in pair_up
constexpr bool HAS_DOT_BYTES = false;
#if defined(__SSSE3__)
constexpr bool HAS_PAIRS = true; // there is pair_up
#else
constexpr bool HAS_PAIRS = false;
#endif

inline Ints no_ints() { return _mm_setzero_si128(); }
inline Ints load_ints(const void *p) { return _mm_load_si128(static_cast<const __m128i *>(p)); }
inline Ints all_lanes(const void *p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm_set1_epi32(x);
}
inline void settle(Ints &x) { asm volatile("" : "+x"(x)); } // matmul_avx2.h says why
inline Ints add(Ints a, Ints b) { return _mm_add_epi32(a, b); }

// sum + the two products of 16-bit words in each lane
inline Ints dot_words(Ints sum, Ints weights, Ints activations) {
    return _mm_add_epi32(sum, _mm_madd_epi16(weights, activations));
}
// Two sums of 16 bits in each lane, of two products of bytes each.
inline Ints pair_up(Ints weights, Ints activations) {
#if defined(__SSSE3__)
    return _mm_maddubs_epi16(weights, activations);
#else
    (void) activations;
    return weights;
#endif
}
inline Ints add_pairs(Ints a, Ints b) { return _mm_add_epi16(a, b); }
inline Ints sum_pairs(Ints pairs) { return _mm_madd_epi16(pairs, _mm_set1_epi16(1)); }

inline Floats no_floats() { return _mm_setzero_ps(); }
inline Floats load_floats(const float *p) { return _mm_loadu_ps(p); }
inline void store_floats(float *p, Floats x) { _mm_storeu_ps(p, x); }
inline Floats all_lanes(float x) { return _mm_set1_ps(x); }
inline Floats to_floats(Ints x) { return _mm_cvtepi32_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm_mul_ps(a, b); }
// Two roundings: there is no fused multiply-add.
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm_add_ps(_mm_mul_ps(a, b), sum); }

// Of each of 16 rows 4 dwords, as `load(row)` gives them, to 4 columns of 16 dwords.
template <class Load> void transpose_rows(Load load, char *columns) {
    for (int first = 0; first < 16; first += 4) {
        const __m128i r[4] = {load(first), load(first + 1), load(first + 2), load(first + 3)};
        const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpackhi_epi32(r[0], r[1]);
        const __m128i c = _mm_unpacklo_epi32(r[2], r[3]), d = _mm_unpackhi_epi32(r[2], r[3]);
        auto *to = reinterpret_cast<__m128i *>(columns + first * 4);
        _mm_store_si128(to, _mm_unpacklo_epi64(a, c));
        _mm_store_si128(to + 4, _mm_unpackhi_epi64(a, c));
        _mm_store_si128(to + 8, _mm_unpacklo_epi64(b, d));
        _mm_store_si128(to + 12, _mm_unpackhi_epi64(b, d));
    }
}

// Of each of 16 rows the 4 dwords that begin `at` bytes after its pointer, to 4 columns of 16 dwords.
inline void transpose4(const char *const *rows, size_t at, char *columns) {
    transpose_rows([=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + at)); }, columns);
}
inline void transpose8(const char *const *rows, size_t at, char *columns) {
    transpose4(rows, at, columns);
    transpose4(rows, at + 16, columns + 4 * 64);
}

// Of each of 16 rows 8 numbers of 16 bits, which become floats, to 8 columns.
inline void transpose8_f16(const char *const *rows, size_t at, char *columns) {
    for (int i = 0; i < 8; i += 4, at += 8, columns += 4 * 64)
        transpose_rows(
            [=](int row) {
                uint16_t numbers[4];
                float floats[4];
                std::memcpy(numbers, rows[row] + at, sizeof numbers);
                for (int number = 0; number < 4; ++number)
                    floats[number] = GGML_CPU_FP16_TO_FP32(numbers[number]);
                return _mm_castps_si128(_mm_loadu_ps(floats));
            },
            columns);
}
inline void transpose8_bf16(const char *const *rows, size_t at, char *columns) {
    for (int i = 0; i < 8; i += 4, at += 8, columns += 4 * 64)
        transpose_rows(
            [=](int row) {
                const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(rows[row] + at));
                return _mm_unpacklo_epi16(_mm_setzero_si128(), halves);
            },
            columns);
}

// Each byte of x, which is below 16, replaced by that number of the table.
template <class Bytes> Bytes look_up(const int8_t *table, const Bytes &x) {
#if defined(__SSSE3__)
    return Bytes(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)), __m128i(x)));
#else
    uint8_t bytes[16];
    std::memcpy(bytes, &x, sizeof bytes);
    for (uint8_t &byte : bytes)
        byte = uint8_t(table[byte]);
    Bytes found;
    std::memcpy(&found, bytes, sizeof found);
    return found;
#endif
}
// In each lane four copies of its byte number `i`.
template <class Bytes> Bytes copy_byte(const Bytes &x, int i) {
    const __m128i one = _mm_and_si128(_mm_srl_epi32(__m128i(x), _mm_cvtsi32_si128(8 * i)), _mm_set1_epi32(255));
    const __m128i two = _mm_or_si128(one, _mm_slli_epi32(one, 8));
    return Bytes(_mm_or_si128(two, _mm_slli_epi32(two, 16)));
}

// Never called, as there are no such products.
inline Ints dot_bytes(Ints sum, Ints, Ints) { return sum; }

} // namespace
