// Instructions of x86 that native/matmul_avx512.h and matmul_avx2.h use and few machines have, in plain C++. They are
// tested on every machine with AVX2. Must be included before everything else.
//
// Each is written as Intel's intrinsics guide describes it. GCC knows the names, but compiles them only for machines
// that have the instructions: so they are redefined. With EMULATES_VNNI, those of VNNI are there, too.
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace emulated {

// A vector of type V as numbers of type T.
template <class T, class V = __m512i> struct Lanes {
    static constexpr int N = sizeof(V) / sizeof(T);
    T x[N];

    explicit Lanes(const V &vector) { std::memcpy(x, &vector, sizeof x); }
    T operator[](int i) const { return x[i]; }
};

// The vector whose lane number `i`, of type T, is f(i).
template <class T, class V = __m512i, class F> V make(F f) {
    V vector;
    for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) {
        const T lane = T(f(i));
        std::memcpy(reinterpret_cast<char *>(&vector) + i * sizeof lane, &lane, sizeof lane);
    }
    return vector;
}

template <class V> V load(const void *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class V> void store(void *p, const V &x) { std::memcpy(p, &x, sizeof x); }

template <class T> __m512i sum(__m512i a, __m512i b) {
    const Lanes<T> x(a), y(b);
    return make<T>([&](int i) { return x[i] + y[i]; });
}

// Products of bytes: those of `a` have no signs, those of `b` do.
template <class V> V dpbusd(V total, V a, V b) {
    const Lanes<int32_t, V> t(total);
    const Lanes<uint8_t, V> x(a);
    const Lanes<int8_t, V> y(b);
    return make<int32_t, V>([&](int i) {
        int32_t result = t[i];
        for (int j = 4 * i; j < 4 * i + 4; ++j)
            result += int32_t(x[j]) * int32_t(y[j]);
        return result;
    });
}
inline __m512i maddubs(__m512i a, __m512i b) {
    const Lanes<uint8_t> x(a);
    const Lanes<int8_t> y(b);
    return make<int16_t>([&](int i) {
        const int both = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
        return both < -32768 ? -32768 : both > 32767 ? 32767 : both;
    });
}
inline __m512i madd(__m512i a, __m512i b) {
    const Lanes<int16_t> x(a), y(b);
    return make<int32_t>([&](int i) { return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
}

inline __m512 to_floats(__m512i a) {
    const Lanes<int32_t> x(a);
    return make<float, __m512>([&](int i) { return x[i]; });
}
inline __m512 halves_to_floats(__m256i a) {
    const Lanes<ggml_fp16_t, __m256i> x(a);
    return make<float, __m512>([&](int i) { return _cvtsh_ss(x[i]); });
}
inline __m512 fma(__m512 a, __m512 b, __m512 c) {
    const Lanes<float, __m512> x(a), y(b), z(c);
    return make<float, __m512>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}

// Alternately a lane of `a` and one of `b`, from the lower or the upper half of each 16 bytes.
template <class T> __m512i unpack(__m512i a, __m512i b, bool upper) {
    constexpr int N = 16 / sizeof(T);
    const Lanes<T> x(a), y(b);
    return make<T>([&](int i) {
        const int from = i / N * N + i % N / 2 + (upper ? N / 2 : 0);
        return i % 2 ? y[from] : x[from];
    });
}
inline __m512i insert(__m512i to, __m128i x, int quarter) {
    std::memcpy(reinterpret_cast<char *>(&to) + 16 * quarter, &x, 16);
    return to;
}
inline __m512i four_times(__m128i x) { return insert(insert(insert(insert(__m512i{}, x, 0), x, 1), x, 2), x, 3); }
inline __m512i shuffle(__m512i table, __m512i places) {
    const Lanes<uint8_t> from(table), at(places);
    return make<uint8_t>([&](int i) { return at[i] & 128 ? 0 : from[i / 16 * 16 + (at[i] & 15)]; });
}
inline __m256i low_words(__m512i a) {
    const Lanes<uint32_t> x(a);
    return make<uint16_t, __m256i>([&](int i) { return x[i]; });
}
template <class F> __m512i shift(__m512i a, F shifted) {
    const Lanes<uint32_t> x(a);
    return make<uint32_t>([&](int i) { return shifted(x[i]); });
}

} // namespace emulated

#undef _mm512_inserti32x4
#undef _mm512_srli_epi32
#undef _mm512_slli_epi32
#define _mm512_setzero_si512() __m512i{}
#define _mm512_setzero_ps() __m512{}
#define _mm512_load_si512 emulated::load<__m512i>
#define _mm512_store_si512 emulated::store<__m512i>
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_storeu_ps emulated::store<__m512>
#define _mm512_store_ps emulated::store<__m512>
#define _mm512_set1_epi32(value) emulated::make<int32_t>([&](int) { return value; })
#define _mm512_set1_epi16(value) emulated::make<int16_t>([&](int) { return value; })
#define _mm512_set1_epi8(value) emulated::make<int8_t>([&](int) { return value; })
#define _mm512_set1_ps(value) emulated::make<float, __m512>([&](int) { return value; })
#define _mm512_add_epi32 emulated::sum<int32_t>
#define _mm512_add_epi16 emulated::sum<int16_t>
#define _mm512_add_epi8 emulated::sum<int8_t>
#define _mm512_maddubs_epi16 emulated::maddubs
#define _mm512_madd_epi16 emulated::madd
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_add_ps(a, b) __m512((a) + (b))
#define _mm512_mul_ps(a, b) __m512((a) * (b))
#define _mm512_fmadd_ps emulated::fma
#define _mm512_castsi128_si512(x) emulated::insert(__m512i{}, x, 0)
#define _mm512_inserti32x4 emulated::insert
#define _mm512_broadcast_i32x4 emulated::four_times
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<int32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<int32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<int64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<int64_t>(a, b, true)
#define _mm512_shuffle_epi8 emulated::shuffle
#define _mm512_srli_epi32(x, n) emulated::shift(x, [](uint32_t lane) { return lane >> n; })
#define _mm512_slli_epi32(x, n) emulated::shift(x, [](uint32_t lane) { return lane << n; })
#define _mm512_and_si512(a, b) __m512i((a) & (b))
#define _mm512_cvtepi32_epi16 emulated::low_words
#define _mm512_cvtph_ps emulated::halves_to_floats

#if defined(EMULATES_VNNI)
#define __AVX512VNNI__ 1
#define __AVXVNNI__ 1
#define _mm512_dpbusd_epi32 emulated::dpbusd<__m512i>
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i>
#endif
