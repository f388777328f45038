// How each type of weights is unpacked: from blocks of a row to whole numbers, scales and offsets.
//
// A weight is scale * code + offset. One block is unpacked at a time. The layouts are ggml's (ggml-common.h); the bits
// are taken apart as dequantize_row_* in ggml-quants.c does it.
//
// Only matmul_product.h includes this. Everything is in an anonymous namespace: each variant of the CPU plugin has its own.
#pragma once

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

inline float half(ggml_half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x); // ggml looks numbers up in a table of 256 KiB, which would push weights out of the cache
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

// 16 or 32 bytes at once. Compilers for every machine know these; loops over bytes they do not always vectorise.
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));

template <class Bytes> Bytes load(const void *p) {
    Bytes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class Bytes> void store(void *p, const Bytes &x) { std::memcpy(p, &x, sizeof x); }

// The low halves of bytes, then the high ones.
template <class Bytes> void split(const uint8_t *packed, uint8_t *codes) {
    const Bytes x = load<Bytes>(packed);
    store<Bytes>(codes, x & 15);
    store<Bytes>(codes + sizeof(Bytes), x >> 4);
}

// What a format says of itself:
//   Block      ggml's block
//   N          weights in a block
//   SCALED     weights that share a scale and an offset
//   SIGNED     whether codes have signs; otherwise they are at least 0 and at most MAX
//   OFFSET     whether there are offsets
//   unpack     N codes, N / SCALED scales, and as many offsets if there are any

struct Q4_0 {
    using Block = block_q4_0;
    static constexpr int N = 32, SCALED = 32, MAX = 15;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        split<Bytes16>(x.qs, codes);
        *scale = half(x.d);
        *offset = -8.0f * *scale;
    }
};

struct Q4_1 {
    using Block = block_q4_1;
    static constexpr int N = 32, SCALED = 32, MAX = 15;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        split<Bytes16>(x.qs, codes);
        *scale = half(x.data.data.d);
        *offset = half(x.data.data.m);
    }
};

// Adds the fifth bits of 32 codes.
inline void add_fifth_bits(const uint8_t *bits, uint8_t *codes) {
    uint64_t copies[4];
    for (int i = 0; i < 4; ++i)
        copies[i] = bits[i] * 0x0101010101010101u;
    const uint64_t place = 0x8040201008040201u, places[4] = {place, place, place, place};
    const auto is_set = Bytes32((load<Bytes32>(copies) & load<Bytes32>(places)) != 0);
    store<Bytes32>(codes, load<Bytes32>(codes) | (is_set & 16));
}

struct Q5_0 {
    using Block = block_q5_0;
    static constexpr int N = 32, SCALED = 32, MAX = 31;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        split<Bytes16>(x.qs, codes);
        add_fifth_bits(x.qh, codes);
        *scale = half(x.d);
        *offset = -16.0f * *scale;
    }
};

struct Q5_1 {
    using Block = block_q5_1;
    static constexpr int N = 32, SCALED = 32, MAX = 31;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        split<Bytes16>(x.qs, codes);
        add_fifth_bits(x.qh, codes);
        *scale = half(x.data.data.d);
        *offset = half(x.data.data.m);
    }
};

struct Q8_0 {
    using Block = block_q8_0;
    static constexpr int N = 32, SCALED = 32, MAX = 127;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        std::memcpy(codes, x.qs, sizeof x.qs);
        *scale = half(x.d);
    }
};

// 16 values of 4 bits each stand for numbers of a table.
inline void look_up(const uint8_t *nibbles, const int8_t *table, uint8_t *codes) {
#if defined(__SSSE3__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(nibbles));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table)), low = _mm_set1_epi8(15);
    auto *target = reinterpret_cast<__m128i *>(codes);
    _mm_storeu_si128(target, _mm_shuffle_epi8(values, _mm_and_si128(bytes, low)));
    _mm_storeu_si128(target + 1, _mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(bytes, 4), low)));
#else
    for (int i = 0; i < 16; ++i) {
        codes[i] = uint8_t(table[nibbles[i] & 15]);
        codes[i + 16] = uint8_t(table[nibbles[i] >> 4]);
    }
#endif
}

struct IQ4_NL {
    using Block = block_iq4_nl;
    static constexpr int N = 32, SCALED = 32, MAX = 127;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        look_up(x.qs, kvalues_iq4nl, codes);
        *scale = half(x.d);
    }
};

struct IQ4_XS {
    using Block = block_iq4_xs;
    static constexpr int N = 256, SCALED = 32, MAX = 127;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        for (int i = 0; i < 8; ++i) {
            look_up(x.qs + 16 * i, kvalues_iq4nl, codes + 32 * i);
            const int low = x.scales_l[i / 2] >> 4 * (i % 2) & 15, high = x.scales_h >> 2 * i & 3;
            scale[i] = half(x.d) * float((low | high << 4) - 32);
        }
    }
};

struct MXFP4 {
    using Block = block_mxfp4;
    static constexpr int N = 32, SCALED = 32, MAX = 12;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        look_up(x.qs, kvalues_mxfp4, codes);
        *scale = GGML_E8M0_TO_FP32_HALF(x.e);
    }
};

// The 6 bits of each of 8 scales and 8 offsets, from the 12 bytes that Q4_K and Q5_K keep them in.
inline void unpack_scales(const uint8_t *packed, float d, float d_min, float *scale, float *offset) {
    for (int i = 0; i < 4; ++i) {
        scale[i] = d * float(packed[i] & 63);
        offset[i] = -d_min * float(packed[i + 4] & 63);
        scale[i + 4] = d * float((packed[i + 8] & 15) | packed[i] >> 6 << 4);
        offset[i + 4] = -d_min * float(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
}

struct Q4_K {
    using Block = block_q4_K;
    static constexpr int N = 256, SCALED = 32, MAX = 15;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        for (int i = 0; i < 4; ++i)
            split<Bytes32>(x.qs + 32 * i, codes + 64 * i);
        unpack_scales(x.scales, half(x.data.data.d), half(x.data.data.dmin), scale, offset);
    }
};

struct Q5_K {
    using Block = block_q5_K;
    static constexpr int N = 256, SCALED = 32, MAX = 31;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        const auto high = load<Bytes32>(x.qh);
        for (int i = 0; i < 4; ++i) {
            const auto low = load<Bytes32>(x.qs + 32 * i);
            store<Bytes32>(codes + 64 * i, (low & 15) | ((high >> 2 * i & 1) << 4));
            store<Bytes32>(codes + 64 * i + 32, low >> 4 | ((high >> (2 * i + 1) & 1) << 4));
        }
        unpack_scales(x.scales, half(x.data.data.d), half(x.data.data.dmin), scale, offset);
    }
};

struct Q6_K {
    using Block = block_q6_K;
    static constexpr int N = 256, SCALED = 16, MAX = 32;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        for (int i = 0; i < 2; ++i) {
            const auto low = load<Bytes32>(x.ql + 64 * i), more = load<Bytes32>(x.ql + 64 * i + 32);
            const auto high = load<Bytes32>(x.qh + 32 * i);
            uint8_t *to = codes + 128 * i;
            store<Bytes32>(to, ((low & 15) | (high & 3) << 4) - 32);
            store<Bytes32>(to + 32, ((more & 15) | (high >> 2 & 3) << 4) - 32);
            store<Bytes32>(to + 64, (low >> 4 | (high >> 4 & 3) << 4) - 32);
            store<Bytes32>(to + 96, (more >> 4 | high >> 6 << 4) - 32);
        }
        for (int i = 0; i < 16; ++i)
            scale[i] = half(x.d) * float(x.scales[i]);
    }
};

struct Q3_K {
    using Block = block_q3_K;
    static constexpr int N = 256, SCALED = 16, MAX = 4;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *) {
        const auto high = load<Bytes32>(x.hmask);
        for (int i = 0; i < 8; ++i) {
            const auto low = load<Bytes32>(x.qs + 32 * (i / 4)) >> 2 * (i % 4) & 3;
            store<Bytes32>(codes + 32 * i, (low | (high >> i & 1) << 2) - 4);
        }
        for (int i = 0; i < 16; ++i) {
            const int low = x.scales[i % 8] >> 4 * (i / 8) & 15, high = x.scales[8 + i % 4] >> 2 * (i / 4) & 3;
            scale[i] = half(x.d) * float((low | high << 4) - 32);
        }
    }
};

struct Q2_K {
    using Block = block_q2_K;
    static constexpr int N = 256, SCALED = 16, MAX = 3;
    static constexpr bool SIGNED = false, OFFSET = true;
    static void unpack(const Block &x, uint8_t *codes, float *scale, float *offset) {
        for (int i = 0; i < 8; ++i)
            store<Bytes32>(codes + 32 * i, load<Bytes32>(x.qs + 32 * (i / 4)) >> 2 * (i % 4) & 3);
        for (int i = 0; i < 16; ++i) {
            scale[i] = half(x.data.data.d) * float(x.scales[i] & 15);
            offset[i] = -half(x.data.data.dmin) * float(x.scales[i] >> 4);
        }
    }
};

// Floats have neither codes nor scales. They are unpacked 8 at a time.

struct F32 {
    using Number = float;
    static void unpack(const Number *x, float *to) { std::memcpy(to, x, 8 * sizeof(float)); }
    static float unpack(Number x) { return x; }
};

struct F16 {
    using Number = ggml_fp16_t;
    static void unpack(const Number *x, float *to) {
#if defined(__F16C__)
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x))));
#else
        for (int i = 0; i < 8; ++i)
            to[i] = half(x[i]);
#endif
    }
    static float unpack(Number x) { return half(x); }
};

struct BF16 {
    using Number = ggml_bf16_t;
    static void unpack(const Number *x, float *to) {
        for (int i = 0; i < 8; ++i)
            to[i] = unpack(x[i]);
    }
    static float unpack(Number x) { return GGML_BF16_TO_FP32(x); }
};

} // namespace
