// Vectors of 16 lanes as arrays, for machines without vectors of ours. Tests compare the others with it.
#pragma once

#include "ggml-impl.h"
#include "matmul_halves.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>

namespace {

struct Ints {
    int32_t lane[16];
};
struct Floats {
    float lane[16];
};

constexpr int LANES = 16;
constexpr int ROWS_OF_INTS = 1;
constexpr int ROWS_OF_FLOATS = 1;
constexpr bool WEIGHTS_ARE_UNSIGNED = false;
constexpr bool HAS_PAIRS = false; // there is no pair_up
constexpr bool HAS_DOT_BYTES = true;

template <class F> Ints of_ints(F lane) {
    Ints x;
    for (int i = 0; i < LANES; ++i)
        x.lane[i] = lane(i);
    return x;
}
template <class F> Floats of_floats(F lane) {
    Floats x;
    for (int i = 0; i < LANES; ++i)
        x.lane[i] = lane(i);
    return x;
}

inline Ints load_ints(const void *p) {
    Ints x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Ints no_ints() { return Ints{}; }
inline void settle(Ints &) {}
inline Ints all_lanes(const void *p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return of_ints([x](int) { return x; });
}
inline Ints add(Ints a, Ints b) {
    return of_ints([&](int i) { return a.lane[i] + b.lane[i]; });
}

inline Ints dot_bytes(Ints sum, Ints weights, Ints activations) {
    int8_t w[4 * LANES], x[4 * LANES];
    std::memcpy(w, &weights, sizeof w);
    std::memcpy(x, &activations, sizeof x);
    return of_ints([&](int i) {
        int32_t products = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j)
            products += int32_t(w[j]) * int32_t(x[j]);
        return sum.lane[i] + products;
    });
}

inline Floats load_floats(const float *p) {
    return of_floats([p](int i) { return p[i]; });
}
inline void store_floats(float *p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline Floats no_floats() { return Floats{}; }
inline Floats all_lanes(float x) {
    return of_floats([x](int) { return x; });
}
inline Floats to_floats(Ints x) {
    return of_floats([&](int i) { return float(x.lane[i]); });
}
inline Floats add(Floats a, Floats b) {
    return of_floats([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats multiply(Floats a, Floats b) {
    return of_floats([&](int i) { return a.lane[i] * b.lane[i]; });
}
// Two roundings: not every machine without vectors of ours has a fused multiply-add.
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
    return of_floats([&](int i) { return a.lane[i] * b.lane[i] + sum.lane[i]; });
}

inline void transpose(const char *const *rows, size_t at, int n, char *columns) {
    for (int row = 0; row < LANES; ++row)
        for (int column = 0; column < n; ++column)
            std::memcpy(columns + column * 64 + row * 4, rows[row] + at + column * 4, 4);
}
// Of each of 16 rows the 8 dwords that begin `at` bytes after its pointer, to 8 columns of 16 dwords.
inline void transpose8(const char *const *rows, size_t at, char *columns) { transpose(rows, at, 8, columns); }
// The same with 4 dwords of each row.
inline void transpose4(const char *const *rows, size_t at, char *columns) { transpose(rows, at, 4, columns); }

// Of each of 16 rows 8 numbers of 16 bits, which become floats, to 8 columns.
template <class Convert> void transpose_halves(const char *const *rows, size_t at, char *columns, Convert convert) {
    for (int row = 0; row < LANES; ++row)
        for (int i = 0; i < 8; ++i) {
            uint16_t number;
            std::memcpy(&number, rows[row] + at + i * 2, 2);
            const float x = convert(number);
            std::memcpy(columns + i * 64 + row * 4, &x, 4);
        }
}
inline void transpose8_f16(const char *const *rows, size_t at, char *columns) {
    transpose_halves(rows, at, columns, [](uint16_t x) { return GGML_CPU_FP16_TO_FP32(x); });
}
inline void transpose8_bf16(const char *const *rows, size_t at, char *columns) {
    transpose_halves(rows, at, columns, [](uint16_t x) { return GGML_BF16_TO_FP32(ggml_bf16_t{x}); });
}

// Each byte of x, which is below 16, replaced by that number of the table.
template <class Bytes> Bytes look_up(const int8_t *table, const Bytes &x) {
    Bytes found;
    for (size_t i = 0; i < sizeof x; ++i)
        found[i] = uint8_t(table[x[i]]);
    return found;
}
// In each lane four copies of its byte number `i`.
template <class Bytes> Bytes copy_byte(const Bytes &x, int i) {
    Bytes copies;
    for (size_t j = 0; j < sizeof x; ++j)
        copies[j] = x[j / 4 * 4 + size_t(i)];
    return copies;
}
// Where bytes with signs can be multiplied, these are never called.
inline Ints dot_words(Ints sum, Ints, Ints) { return sum; }
inline Ints pair_up(Ints weights, Ints) { return weights; }
inline Ints add_pairs(Ints a, Ints) { return a; }
inline Ints sum_pairs(Ints pairs) { return pairs; }

} // namespace
