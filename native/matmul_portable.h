// Vectors of 16 lanes as arrays, for machines without vectors of ours. Tests compare the others with it.
#pragma once

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
inline void store_ints(void *p, Ints x) { std::memcpy(p, &x, sizeof x); }
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
inline Floats multiply(Floats a, Floats b) {
    return of_floats([&](int i) { return a.lane[i] * b.lane[i]; });
}
// Two roundings: not every machine without vectors of ours has a fused multiply-add.
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
    return of_floats([&](int i) { return a.lane[i] * b.lane[i] + sum.lane[i]; });
}

inline void transpose(const void *rows, size_t stride, void *out) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column)
            std::memcpy(static_cast<char *>(out) + column * 64 + row * 4,
                        static_cast<const char *>(rows) + row * stride + column * 4, 4);
}

// Where bytes with signs can be multiplied, these are never called.
inline void widen(Ints, Ints &, Ints &) {}
inline Ints flip_signs(Ints bytes) { return bytes; }
inline Ints dot_words(Ints sum, Ints, Ints) { return sum; }
inline Ints pair_up(Ints weights, Ints) { return weights; }
inline Ints add_pairs(Ints a, Ints) { return a; }
inline Ints sum_pairs(Ints pairs) { return pairs; }

} // namespace
