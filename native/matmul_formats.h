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
typedef uint32_t Dwords __attribute__((vector_size(LANES * 4)));

template <class V> V load(const void *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class V> void store(void *p, const V &x) { std::memcpy(p, &x, sizeof x); }

// Bytes shifted, with bits of their neighbours where zeros should be: compilers have no good code for most such shifts.
inline Bytes shift_left(const Bytes &x, int n) { return Bytes(Words(x) << n); }
inline Bytes shift_right(const Bytes &x, int n) { return Bytes(Words(x) >> n); }

// The same block of each of 16 rows.
template <class Block> struct Blocks {
    const char *rows[TILE];

    Blocks(const char *const (&begins)[TILE], int64_t number) {
        for (int row = 0; row < TILE; ++row)
            rows[row] = begins[row] + size_t(number) * sizeof(Block);
    }
    const Block &operator[](int row) const { return *reinterpret_cast<const Block *>(rows[row]); }
};

// The number of 16 bits that is `at` bytes after the beginning of a block, of 16 rows.
template <class Block> void halves(const Blocks<Block> &blocks, size_t at, float *of_rows) {
    alignas(64) uint32_t numbers[TILE] = {};
    for (int row = 0; row < TILE; ++row) {
        ggml_half number;
        std::memcpy(&number, blocks.rows[row] + at, sizeof number);
        numbers[row] = number;
    }
    low_halves(numbers, of_rows);
}
template <class Block> void first_halves(const Blocks<Block> &blocks, float *of_rows) { halves(blocks, 0, of_rows); }
template <class Block> void second_halves(const Blocks<Block> &blocks, float *of_rows) { halves(blocks, 2, of_rows); }

// The first four bytes of a block of each of 16 rows: one or two numbers of 16 bits.
using Heads = const uint32_t *;

inline void multiples(const float *x, float factor, float *of_rows) {
    for (int row = 0; row < TILE; ++row)
        of_rows[row] = x[row] * factor;
}

// 32 bits of each of 16 rows times a factor of the row, as floats.
inline void multiples_of_dwords(const Dwords &x, const float *factors, float *of_rows) {
    store_floats(of_rows, multiply(to_floats(load_ints(&x)), load_floats(factors)));
}
// Four bytes of some rows, with or without signs, times factors of the rows: the scales or offsets of four groups.
inline void multiples_of_bytes(const Dwords &x, bool has_signs, const float *factors, float *of_rows) {
    typedef int32_t Signed __attribute__((vector_size(LANES * 4)));
    for (int i = 0; i < 4; ++i) {
        const Dwords byte_on_top = x << (24 - 8 * i);
        const Dwords number = has_signs ? Dwords(Signed(byte_on_top) >> 24) : byte_on_top >> 24;
        multiples_of_dwords(number, factors, of_rows + i * TILE);
    }
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

// 32 weights like Nibbles, whose numbers stand for those of a table.
template <class B, const int8_t *TABLE> struct TableNibbles {
    using Block = B;
    static constexpr int N = 32, CHUNK = 32, SCALED = 32, COLUMNS = 4;
    static constexpr bool SIGNED = true, OFFSET = false;
    static void gather(const Blocks<B> &blocks, int, char *columns) { gather4(blocks, offsetof(B, qs), columns); }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const auto x = load<Bytes>(columns + i * COLUMN);
            put(i, look_up(TABLE, x & 15));
            put(i + 4, look_up(TABLE, x >> 4));
        }
    }
};

struct IQ4_NL : TableNibbles<block_iq4_nl, kvalues_iq4nl> {
    static constexpr int MAX = 127;
    static constexpr bool HAS_HEADS = true;
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
        alignas(64) char columns[4 * COLUMN]; // d and high bits of the scales; their low bits; codes, not needed here
        float d[TILE];
        first_halves(blocks, d);
        gather4(blocks, 0, columns);
        for (int row = 0; row < TILE; row += LANES) {
            const auto high = load<Dwords>(columns + 4 * row) >> 16, low = load<Dwords>(columns + COLUMN + 4 * row);
            for (int i = 0; i < 8; ++i)
                multiples_of_dwords(((low >> 4 * i & 15) | (high >> 2 * i & 3) << 4) - 32, d + row,
                                    scales + i * TILE + row);
        }
    }
};

struct MXFP4 : TableNibbles<block_mxfp4, kvalues_mxfp4> {
    static constexpr int MAX = 12;
    static constexpr bool HAS_HEADS = false;
    static void scales(const Blocks<Block> &blocks, float *scales, float *) {
        for (int row = 0; row < TILE; ++row)
            scales[row] = GGML_E8M0_TO_FP32_HALF(blocks[row].e);
    }
};

// Q4_K and Q5_K: 6 bits of each of 8 scales and 8 offsets, in 12 bytes.
template <class Block> void scales_of_six_bits(const Blocks<Block> &blocks, float *scales, float *offsets) {
    alignas(64) char columns[4 * COLUMN];
    float d[TILE], d_min[TILE];
    first_halves(blocks, d);
    second_halves(blocks, d_min);
    multiples(d_min, -1.0f, d_min);
    gather4(blocks, offsetof(Block, scales), columns);
    for (int row = 0; row < TILE; row += LANES) {
        const auto a = load<Dwords>(columns + 4 * row), b = load<Dwords>(columns + COLUMN + 4 * row),
                   c = load<Dwords>(columns + 2 * COLUMN + 4 * row);
        multiples_of_bytes(a & 0x3f3f3f3f, false, d + row, scales + row);
        multiples_of_bytes((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030), false, d + row, scales + 4 * TILE + row);
        multiples_of_bytes(b & 0x3f3f3f3f, false, d_min + row, offsets + row);
        multiples_of_bytes((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030), false, d_min + row, offsets + 4 * TILE + row);
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
            const auto high = shift_right(load<Bytes>(columns + (i + 8) * COLUMN), 2 * chunk);
            put(i, (x & 15) | (shift_left(high, 4) & 16));
            put(i + 8, x >> 4 | (shift_left(high, 3) & 16));
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        scales_of_six_bits(blocks, scales, offsets);
    }
};

struct Q6_K {
    using Block = block_q6_K;
    static constexpr int N = 256, CHUNK = 128, SCALED = 16, MAX = 63, COLUMNS = 24;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = false;
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
            put(i, (low & 15) | (shift_left(high, 4) & 48));
            put(i + 8, (more & 15) | (shift_left(high, 2) & 48));
            put(i + 16, low >> 4 | (high & 48));
            put(i + 24, more >> 4 | (high >> 2 & 48));
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        alignas(64) char columns[4 * COLUMN];
        float d[TILE];
        halves(blocks, offsetof(Block, d), d);
        gather4(blocks, offsetof(Block, scales), columns);
        for (int i = 0; i < 4; ++i)
            for (int row = 0; row < TILE; row += LANES)
                multiples_of_bytes(load<Dwords>(columns + i * COLUMN + 4 * row), true, d + row,
                                   scales + 4 * i * TILE + row);
        for (int i = 0; i < 16; ++i)
            multiples(scales + i * TILE, -32.0f, offsets + i * TILE);
    }
};

struct Q3_K {
    using Block = block_q3_K;
    static constexpr int N = 256, CHUNK = 128, SCALED = 16, MAX = 7, COLUMNS = 16;
    static constexpr bool SIGNED = false, OFFSET = true, HAS_HEADS = false;
    static void gather(const Blocks<Block> &blocks, int chunk, char *columns) {
        gather8(blocks, offsetof(Block, qs) + size_t(chunk) * 32, columns);
        gather8(blocks, offsetof(Block, hmask), columns + 8 * COLUMN);
    }
    template <class Put> ALWAYS_INLINE static void codes(const char *columns, int chunk, Put put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const auto low = load<Bytes>(columns + i * COLUMN);
            const auto high = shift_right(load<Bytes>(columns + (i + 8) * COLUMN), 4 * chunk);
            put(i, (low & 3) | (shift_left(high, 2) & 4));
            put(i + 8, (low >> 2 & 3) | (shift_left(high, 1) & 4));
            put(i + 16, (low >> 4 & 3) | (high & 4));
            put(i + 24, low >> 6 | (high >> 1 & 4));
        }
    }
    static void scales(const Blocks<Block> &blocks, float *scales, float *offsets) {
        alignas(64) char columns[4 * COLUMN]; // codes, not needed here; 8 bytes with low bits; 4 bytes with high bits
        float d[TILE];
        halves(blocks, offsetof(Block, d), d);
        gather4(blocks, offsetof(Block, scales) - 4, columns); // 4 bytes later, it would read behind the block
        for (int i = 0; i < 4; ++i)
            for (int row = 0; row < TILE; row += LANES) {
                const auto low = load<Dwords>(columns + (i % 2 + 1) * COLUMN + 4 * row),
                           high = load<Dwords>(columns + 3 * COLUMN + 4 * row);
                const auto bits = (low >> 4 * (i / 2) & 0x0f0f0f0f) | (high >> 2 * i & 0x03030303) << 4;
                multiples_of_bytes(Dwords(Bytes(bits) - 32), true, d + row, scales + 4 * i * TILE + row);
            }
        for (int i = 0; i < 16; ++i)
            multiples(scales + i * TILE, -4.0f, offsets + i * TILE);
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
        alignas(64) char columns[4 * COLUMN];
        float d[TILE], d_min[TILE];
        halves(blocks, offsetof(Block, data), d);
        halves(blocks, offsetof(Block, data) + 2, d_min);
        multiples(d_min, -1.0f, d_min);
        gather4(blocks, offsetof(Block, scales), columns);
        for (int i = 0; i < 4; ++i)
            for (int row = 0; row < TILE; row += LANES) {
                const auto both = load<Dwords>(columns + i * COLUMN + 4 * row);
                multiples_of_bytes(both & 0x0f0f0f0f, false, d + row, scales + 4 * i * TILE + row);
                multiples_of_bytes(both >> 4 & 0x0f0f0f0f, false, d_min + row, offsets + 4 * i * TILE + row);
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
