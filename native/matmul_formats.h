// How each type of weights is unpacked: from ggml's blocks to whole numbers, scales and offsets, for 16 rows at once.
//
// A weight is scale * code + offset. Blocks are laid out as ggml-common.h says, and the bits are taken apart as
// dequantize_row_* in ggml-quants.c does it. But here, the packed bytes of 16 rows are brought into columns first: each
// column has four bytes of each row. So the bits of all rows are taken apart together, and few bytes need to be moved.
//
// Only matmul_product.h includes this. Everything is in an anonymous namespace: each variant of the CPU plugin has its own.
#pragma once

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

#define ALWAYS_INLINE __attribute__((always_inline)) inline

constexpr int TILE = 16;        // rows that are unpacked, and multiplied, at once
constexpr int COLUMN = TILE * 4; // bytes of a column

// As many bytes of a column as a vector has. The compiler knows the operators of these.
typedef uint8_t Bytes __attribute__((vector_size(LANES * 4)));
typedef int16_t Words __attribute__((vector_size(LANES * 4)));

template <class V> V load(const void *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class V> void store(void *p, const V &x) { std::memcpy(p, &x, sizeof x); }

// The same block of each of 16 rows.
template <class Block> struct Blocks {
    const char *rows[TILE];

    Blocks(const char *const (&begins)[TILE], int64_t number) {
        for (int row = 0; row < TILE; ++row)
            rows[row] = begins[row] + size_t(number) * sizeof(Block);
    }
    const Block &operator[](int row) const { return *reinterpret_cast<const Block *>(rows[row]); }
};

inline float half(ggml_half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x); // ggml looks numbers up in a table of 256 KiB, which would push weights out of the cache
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

// The first four bytes of a block of each of 16 rows: one or two numbers of 16 bits.
using Heads = const uint32_t *;

inline void multiples(const float *x, float factor, float *of_rows) {
    for (int row = 0; row < TILE; ++row)
        of_rows[row] = x[row] * factor;
}

// Columns of the 16 or 32 bytes of each block that begin `at` bytes after it.
template <class Block> void gather4(const Blocks<Block> &blocks, size_t at, char *columns) {
    transpose4(blocks.rows, at, columns);
}
template <class Block> void gather8(const Blocks<Block> &blocks, size_t at, char *columns) {
    transpose8(blocks.rows, at, columns);
}

// What a format says of itself:
//   Block      ggml's block
//   N          weights in a block
//   CHUNK      weights whose codes are unpacked at once; a block has N / CHUNK chunks
//   SCALED     weights that share a scale and an offset
//   MAX        the greatest code (in magnitude); SIGNED: whether there are codes below zero
//   OFFSET     whether there are offsets
//   COLUMNS    columns of packed bytes that a chunk needs
//   gather     brings them into columns
//   codes      from a vector of each column (COLUMN bytes apart) to the codes: put(i, x) takes those of the weights from
//              4 * i to 4 * i + 3 of the chunk
//   scales     for each group of SCALED weights of a block the scales of 16 rows, then those of the next group; likewise
//              the offsets, if there are any. It takes the Heads of the blocks if HAS_HEADS, else Blocks

template <class B> struct Nibbles { // 32 weights: first the low halves of 16 bytes, then the high ones
    using Block = B;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, MAX = 15, COLUMNS = 4;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = true;
    static void gather(const Blocks<B> &blocks, int, char *columns) { gather4(blocks, offsetof(B, qs), columns); }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, x & 15);
            put(i + 4, x >> 4);
        }
    }
};

struct Q4_0 : Nibbles<block_q4_0> {
    static void scales(Heads heads, float *scales, float *offsets) {
        low_halves(heads, scales);
        multiples(scales, -8.0f, offsets);
    }
};

struct Q4_1 : Nibbles<block_q4_1> {
    static void scales(Heads heads, float *scales, float *offsets) {
        low_halves(heads, scales);
        high_halves(heads, offsets);
    }
};

template <class B> struct FiveBits { // like Nibbles, and the fifth bits in 32 bits of their own
    using Block = B;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, MAX = 31, COLUMNS = 5;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = true;
    static void gather(const Blocks<B> &blocks, int, char *columns) {
        gather4(blocks, offsetof(B, qs), columns);
        for (int row = 0; row < TILE; ++row)
            std::memcpy(columns + 4 * COLUMN + 4 * row, blocks[row].qh, 4);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
        const auto bits = load<Bytes>(columns + 4 * COLUMN);
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, (x & 15) | fifth_bits(bits, i));
            put(i + 4, x >> 4 | fifth_bits(bits, i + 4));
        }
    }

private:
    // Of 32 bits of each row the four from 4 * i on, each as the value 16 in a byte of its own.
    static Bytes fifth_bits(const Bytes &bits, int i) {
        const auto copies = copy_byte(bits, i / 2);
        const uint8_t b = uint8_t(1 << 4 * (i % 2));
        const uint32_t places = b | uint32_t(b << 1) << 8 | uint32_t(b << 2) << 16 | uint32_t(uint8_t(b << 3)) << 24;
        typedef uint32_t Dwords __attribute__((vector_size(LANES * 4)));
        return Bytes((copies & Bytes(Dwords{} + places)) != 0) & 16;
    }
};

struct Q5_0 : FiveBits<block_q5_0> {
    static void scales(Heads heads, float *scales, float *offsets) {
        low_halves(heads, scales);
        multiples(scales, -16.0f, offsets);
    }
};

struct Q5_1 : FiveBits<block_q5_1> {
    static void scales(Heads heads, float *scales, float *offsets) {
        low_halves(heads, scales);
        high_halves(heads, offsets);
    }
};

struct Q8_0 {
    using Block = block_q8_0;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, MAX = 128, COLUMNS = 8;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = true;
    static void gather(const Blocks<Block> &blocks, int, char *columns) { gather8(blocks, offsetof(Block, qs), columns); }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
            put(i, load<Bytes>(columns + i * COLUMN));
    }
    static void scales(Heads heads, float *scales, float *) { low_halves(heads, scales); }
};

struct IQ4_NL {
    using Block = block_iq4_nl;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, MAX = 127, COLUMNS = 4;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = true;
    static void gather(const Blocks<Block> &blocks, int, char *columns) { gather4(blocks, offsetof(Block, qs), columns); }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, look_up(kvalues_iq4nl, x & 15));
            put(i + 4, look_up(kvalues_iq4nl, x >> 4));
        }
    }
    static void scales(Heads heads, float *scales, float *) { low_halves(heads, scales); }
};

struct IQ4_XS {
    using Block = block_iq4_xs;
    static constexpr int N = 256, CHUNK = 32, SCALED = 32, MAX = 127, COLUMNS = 4;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather4(blocks, offsetof(Block, qs) + size_t(chunk) * 16, columns);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) { IQ4_NL::codes(columns, 0, put); }
    static void scales(const Blocks<Block> &blocks, float *scales, float *) {
        for (int row = 0; row < TILE; ++row) {
            const Block &x = blocks[row];
            const float d = half(x.d);
            for (int i = 0; i < 8; ++i) {
                const int low = x.scales_l[i / 2] >> 4 * (i % 2) & 15, high = x.scales_h >> 2 * i & 3;
                scales[i * TILE + row] = d * float((low | high << 4) - 32);
            }
        }
    }
};

struct MXFP4 {
    using Block = block_mxfp4;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, MAX = 12, COLUMNS = 4;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int, char *columns) { gather4(blocks, offsetof(Block, qs), columns); }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, look_up(kvalues_mxfp4, x & 15));
            put(i + 4, look_up(kvalues_mxfp4, x >> 4));
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *) {
        for (int row = 0; row < TILE; ++row)
            scales[row] = GGML_E8M0_TO_FP32_HALF(blocks[row].e);
    }
};

// Q4_K and Q5_K: 6 bits of each of 8 scales and 8 offsets, in 12 bytes.
template <class Block> void scales_of_six_bits(const Blocks<Block> &blocks, float *scales, float *offsets) {
    for (int row = 0; row < TILE; ++row) {
        const float d = half(blocks[row].data.data.d), d_min = half(blocks[row].data.data.dmin);
        uint32_t packed[3];
        std::memcpy(packed, blocks[row].scales, sizeof packed);
        // Four numbers at once, one in each byte: the numbers 0 to 3, then 4 to 7.
        const uint32_t s[2] = {packed[0] & 0x3f3f3f3f, (packed[2] & 0x0f0f0f0f) | (packed[0] >> 2 & 0x30303030)};
        const uint32_t o[2] = {packed[1] & 0x3f3f3f3f, (packed[2] >> 4 & 0x0f0f0f0f) | (packed[1] >> 2 & 0x30303030)};
        for (int i = 0; i < 8; ++i) {
            scales[i * TILE + row] = d * float(s[i / 4] >> 8 * (i % 4) & 255);
            offsets[i * TILE + row] = -d_min * float(o[i / 4] >> 8 * (i % 4) & 255);
        }
    }
}

struct Q4_K {
    using Block = block_q4_K;
    static constexpr int N = 256, CHUNK = 64, SCALED = 32, MAX = 15, COLUMNS = 8;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, qs) + size_t(chunk) * 32, columns);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, x & 15);
            put(i + 8, x >> 4);
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        scales_of_six_bits(blocks, scales, offsets);
    }
};

struct Q5_K {
    using Block = block_q5_K;
    static constexpr int N = 256, CHUNK = 64, SCALED = 32, MAX = 31, COLUMNS = 16;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, qs) + size_t(chunk) * 32, columns);
        gather8(blocks, offsetof(Block, qh), columns + 8 * COLUMN);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int chunk, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            const auto high = load<Bytes>(columns + (i + 8) * COLUMN) >> uint8_t(2 * chunk);
            put(i, (x & 15) | (high & 1) << 4);
            put(i + 8, x >> 4 | (high & 2) << 3);
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        scales_of_six_bits(blocks, scales, offsets);
    }
};

struct Q6_K {
    using Block = block_q6_K;
    static constexpr int N = 256, CHUNK = 128, SCALED = 16, MAX = 32, COLUMNS = 24;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, ql) + size_t(chunk) * 64, columns);
        gather8(blocks, offsetof(Block, ql) + size_t(chunk) * 64 + 32, columns + 8 * COLUMN);
        gather8(blocks, offsetof(Block, qh) + size_t(chunk) * 32, columns + 16 * COLUMN);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto low = load<Bytes>(columns + i * COLUMN), more = load<Bytes>(columns + (i + 8) * COLUMN);
            const auto high = load<Bytes>(columns + (i + 16) * COLUMN);
            put(i, ((low & 15) | (high & 3) << 4) - 32);
            put(i + 8, ((more & 15) | (high & 12) << 2) - 32);
            put(i + 16, (low >> 4 | (high & 48)) - 32);
            put(i + 24, (more >> 4 | (high >> 2 & 48)) - 32);
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *) {
        for (int row = 0; row < TILE; ++row) {
            const float d = half(blocks[row].d);
            for (int i = 0; i < 16; ++i)
                scales[i * TILE + row] = d * float(blocks[row].scales[i]);
        }
    }
};

struct Q3_K {
    using Block = block_q3_K;
    static constexpr int N = 256, CHUNK = 128, SCALED = 16, MAX = 4, COLUMNS = 16;
    static constexpr bool SIGNED = true, OFFSET = false, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, qs) + size_t(chunk) * 32, columns);
        gather8(blocks, offsetof(Block, hmask), columns + 8 * COLUMN);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int chunk, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto low = load<Bytes>(columns + i * COLUMN);
            const auto high = load<Bytes>(columns + (i + 8) * COLUMN) >> uint8_t(4 * chunk);
            put(i, ((low & 3) | (high & 1) << 2) - 4);
            put(i + 8, ((low >> 2 & 3) | (high & 2) << 1) - 4);
            put(i + 16, ((low >> 4 & 3) | (high & 4)) - 4);
            put(i + 24, (low >> 6 | (high >> 1 & 4)) - 4);
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *) {
        for (int row = 0; row < TILE; ++row) {
            const Block &x = blocks[row];
            const float d = half(x.d);
            for (int i = 0; i < 16; ++i) {
                const int low = x.scales[i % 8] >> 4 * (i / 8) & 15, high = x.scales[8 + i % 4] >> 2 * (i / 4) & 3;
                scales[i * TILE + row] = d * float((low | high << 4) - 32);
            }
        }
    }
};

struct Q2_K {
    using Block = block_q2_K;
    static constexpr int N = 256, CHUNK = 128, SCALED = 16, MAX = 3, COLUMNS = 8;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, qs) + size_t(chunk) * 32, columns);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, x & 3);
            put(i + 8, x >> 2 & 3);
            put(i + 16, x >> 4 & 3);
            put(i + 24, x >> 6);
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        for (int row = 0; row < TILE; ++row) {
            const Block &x = blocks[row];
            const float d = half(x.data.data.d), d_min = half(x.data.data.dmin);
            for (int i = 0; i < 16; ++i) {
                scales[i * TILE + row] = d * float(x.scales[i] & 15);
                offsets[i * TILE + row] = -d_min * float(x.scales[i] >> 4);
            }
        }
    }
};

// Floats have neither codes nor scales. Columns of 8 numbers are made of them at once.

struct F32 {
    using Number = float;
    static void gather(const char *const *rows, size_t at, char *columns) { transpose8(rows, at, columns); }
};

struct F16 {
    using Number = ggml_fp16_t;
    static void gather(const char *const *rows, size_t at, char *columns) { transpose8_f16(rows, at, columns); }
};

struct BF16 {
    using Number = ggml_bf16_t;
    static void gather(const char *const *rows, size_t at, char *columns) { transpose8_bf16(rows, at, columns); }
};

} // namespace
