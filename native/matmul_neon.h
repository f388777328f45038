// Vectors of 4 lanes, for 64-bit ARM. With the dot product instructions, products of bytes are summed by one of them.
#pragma once

#include <arm_neon.h>
#include <cstddef>
#include <cstdint>

namespace {

using Ints = int32x4_t;
using Floats = float32x4_t;

constexpr int LANES = 4;
constexpr int ROWS_OF_INTS = 3;   // rows that are multiplied with a tile at once: what 32 registers hold
constexpr int ROWS_OF_FLOATS = 5; // 5 x 4 chains of additions: cores have up to 4 units, each takes 4 cycles
constexpr bool WEIGHTS_ARE_UNSIGNED = false;
constexpr bool HAS_PAIRS = false; // there is no pair_up
constexpr bool HAS_DOT_BYTES = true;

inline Ints no_ints() { return vdupq_n_s32(0); }
inline Ints load_ints(const void *p) { return vld1q_s32(static_cast<const int32_t *>(p)); }
inline Ints all_lanes(const void *p) { return vld1q_dup_s32(static_cast<const int32_t *>(p)); }
inline void settle(Ints &x) { asm volatile("" : "+w"(x)); } // matmul_avx2.h says why
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }

// sum + the four products of bytes in each lane
inline Ints dot_bytes(Ints sum, Ints weights, Ints activations) {
    const int8x16_t a = vreinterpretq_s8_s32(weights), b = vreinterpretq_s8_s32(activations);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

inline Floats no_floats() { return vdupq_n_f32(0.0f); }
inline Floats load_floats(const float *p) { return vld1q_f32(p); }
inline void store_floats(float *p, Floats x) { vst1q_f32(p, x); }
inline Floats all_lanes(float x) { return vdupq_n_f32(x); }
inline Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return vfmaq_f32(sum, a, b); }

// Of each of 16 rows 4 dwords, as `load(row)` gives them, to 4 columns of 16 dwords.
template <class Load> void transpose_rows(Load load, char *columns) {
    for (int first = 0; first < 16; first += 4) {
        const int32x4_t a = load(first), b = load(first + 1), c = load(first + 2), d = load(first + 3);
        const auto pairs = [](int32x4_t dwords) { return vreinterpretq_s64_s32(dwords); };
        const int64x2_t even_ab = pairs(vtrn1q_s32(a, b)), odd_ab = pairs(vtrn2q_s32(a, b));
        const int64x2_t even_cd = pairs(vtrn1q_s32(c, d)), odd_cd = pairs(vtrn2q_s32(c, d));
        auto *to = reinterpret_cast<int64_t *>(columns + first * 4);
        vst1q_s64(to, vtrn1q_s64(even_ab, even_cd));
        vst1q_s64(to + 8, vtrn1q_s64(odd_ab, odd_cd));
        vst1q_s64(to + 16, vtrn2q_s64(even_ab, even_cd));
        vst1q_s64(to + 24, vtrn2q_s64(odd_ab, odd_cd));
    }
}

// Of each of 16 rows the 4 dwords that begin `at` bytes after its pointer, to 4 columns of 16 dwords.
inline void transpose4(const char *const *rows, size_t at, char *columns) {
    transpose_rows(
        [=](int row) {
            const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t *>(rows[row] + at));
            return vreinterpretq_s32_u8(bytes);
        },
        columns);
}
inline void transpose8(const char *const *rows, size_t at, char *columns) {
    transpose4(rows, at, columns);
    transpose4(rows, at + 16, columns + 4 * 64);
}
// The same with 8 numbers of 16 bits in each row, which `convert` makes floats of, four at a time.
template <class Convert> void transpose_halves(const char *const *rows, size_t at, char *columns, Convert convert) {
    for (int i = 0; i < 8; i += 4, at += 8, columns += 4 * 64)
        transpose_rows(
            [=](int row) {
                const uint8x8_t bytes = vld1_u8(reinterpret_cast<const uint8_t *>(rows[row] + at));
                return convert(vreinterpret_u16_u8(bytes));
            },
            columns);
}
inline Floats f16_to_floats(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline void transpose8_f16(const char *const *rows, size_t at, char *columns) {
    transpose_halves(rows, at, columns, [](uint16x4_t x) { return vreinterpretq_s32_f32(f16_to_floats(x)); });
}
inline void transpose8_bf16(const char *const *rows, size_t at, char *columns) {
    transpose_halves(rows, at, columns,
                     [](uint16x4_t x) { return vreinterpretq_s32_u32(vshlq_n_u32(vmovl_u16(x), 16)); });
}

// Each byte of x, which is below 16, replaced by that number of the table.
template <class Bytes> Bytes look_up(const int8_t *table, const Bytes &x) {
    return Bytes(vqtbl1q_s8(vld1q_s8(table), uint8x16_t(x)));
}
// In each lane four copies of its byte number `i`.
template <class Bytes> Bytes copy_byte(const Bytes &x, int i) {
    const uint32x4_t first = {0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c};
    return Bytes(vqtbl1q_u8(uint8x16_t(x), vaddq_u8(vreinterpretq_u8_u32(first), vdupq_n_u8(uint8_t(i)))));
}
// 16 floats of the lower, or higher, 16 bits of as many dwords.
inline void low_halves(const uint32_t *x, float *to) {
    for (int i = 0; i < 16; i += 4)
        vst1q_f32(to + i, f16_to_floats(vmovn_u32(vld1q_u32(x + i))));
}
inline void high_halves(const uint32_t *x, float *to) {
    for (int i = 0; i < 16; i += 4)
        vst1q_f32(to + i, f16_to_floats(vshrn_n_u32(vld1q_u32(x + i), 16)));
}

// Where bytes with signs can be multiplied, these are never called.
inline Ints dot_words(Ints sum, Ints, Ints) { return sum; }
inline Ints pair_up(Ints weights, Ints) { return weights; }
inline Ints add_pairs(Ints a, Ints) { return a; }
inline Ints sum_pairs(Ints pairs) { return pairs; }

} // namespace
