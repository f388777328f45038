// The rows that weights are multiplied with, as whole numbers.
//
// Each row is rounded once, on its own, 32 numbers at a time: x = scale * code. Its place in memory holds the codes,
// then the scales, then for each group of weights that share an offset the sum of its numbers, which is what the offset
// is multiplied with. Where weights are unsigned bytes or the machine multiplies bytes, codes are bytes; else words.
// Where 128 was added to weights to make them unsigned, the place of sums has, as whole numbers, what takes that off again.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int GROUP = 32; // numbers of a row that share a scale

// What a product needs of a row of activations: where things are, in bytes from its beginning.
struct Layout {
    int64_t k = 0;           // numbers in a row
    bool is_wide = false;    // codes are words
    int summed = 0;          // numbers in each sum; 0: no sums
    bool is_flipped = false; // sums are whole numbers: those of the codes, times -128

    int64_t code_size() const { return is_wide ? 2 : 1; }
    int64_t scales() const { return k * code_size(); }
    int64_t sums() const { return scales() + k / GROUP * int64_t(sizeof(float)); }
    int64_t size() const {
        const int64_t n = sums() + (summed ? k / summed * int64_t(sizeof(float)) : 0);
        return (n + 63) / 64 * 64;
    }
};

// The nearest whole number, ties to even. |x| must be below 2^22. Vectorises, unlike std::nearbyint.
inline int32_t nearest(float x) {
    const float shifted = x + 12582912.0f; // 1.5 * 2^23: the bits below the point fall off
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

// The greatest of a group's numbers without their signs; NaN if there is one. As whole numbers, the bits of floats
// without signs are in the order of the floats, and NaN comes after infinity.
inline float greatest(const float *x) {
    int32_t bits[GROUP], lanes[8] = {};
    std::memcpy(bits, x, sizeof bits);
    for (int i = 0; i < GROUP; i += 8)
        for (int j = 0; j < 8; ++j)
            lanes[j] = std::max(lanes[j], bits[i + j] & 0x7fffffff);
    const int32_t highest = *std::max_element(lanes, lanes + 8);
    float result;
    std::memcpy(&result, &highest, sizeof result);
    return result;
}

// Rounds the groups [begin, end) of a row.
inline void round_row(const Layout &layout, const float *x, int64_t begin, int64_t end, char *row) {
    const float most = layout.is_wide ? 32767.0f : 127.0f;
    auto *scales = reinterpret_cast<float *>(row + layout.scales());
    char *sums = row + layout.sums();
    for (int64_t group = begin; group < end; ++group) {
        const float *numbers = x + group * GROUP;
        const float highest = greatest(numbers), scale = highest / most;
        // A group of numbers so small that the factor would not be finite counts as zeros. A NaN or an infinite number
        // is kept by the scale: all results of the row become NaN.
        const float factor = highest > most * FLT_MIN ? most / highest : 0.0f;
        int32_t codes[GROUP];
        for (int i = 0; i < GROUP; ++i)
            codes[i] = nearest(numbers[i] * factor);
        scales[group] = scale;
        if (layout.is_wide) {
            // In the order of vectors' widen(): of four codes the first and the third, then the second and the fourth.
            auto *to = reinterpret_cast<int16_t *>(row) + group * GROUP;
            for (int i = 0; i < GROUP; i += 4) {
                to[i] = int16_t(codes[i]);
                to[i + 1] = int16_t(codes[i + 2]);
                to[i + 2] = int16_t(codes[i + 1]);
                to[i + 3] = int16_t(codes[i + 3]);
            }
        } else {
            auto *to = reinterpret_cast<int8_t *>(row) + group * GROUP;
            for (int i = 0; i < GROUP; ++i)
                to[i] = int8_t(codes[i]);
        }
        for (int i = 0; i < GROUP && layout.summed; i += layout.summed) {
            int32_t sum = 0;
            for (int j = 0; j < layout.summed; ++j)
                sum += codes[i + j];
            const int64_t at = (group * GROUP + i) / layout.summed;
            if (layout.is_flipped) reinterpret_cast<int32_t *>(sums)[at] = -128 * sum;
            else reinterpret_cast<float *>(sums)[at] = scale * float(sum);
        }
    }
}

} // namespace
