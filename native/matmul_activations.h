// The rows that weights are multiplied with, as whole numbers.
//
// Each row is rounded once, on its own, 32 numbers at a time: x = scale * code. Its place in memory holds the codes,
// then the scales, then for each group of weights that share an offset the sum of its numbers, which is what the offset
// is multiplied with. Where weights are unsigned bytes or the machine multiplies bytes, codes are bytes; else words.
// Where 128 was added to weights to make them unsigned, whole numbers that take that off again are in the place of sums.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32; // numbers of a row that share a scale

// What a product needs of a row of activations: where things are, in bytes from its beginning.
struct Layout {
    int64_t k = 0;           // numbers in a row
    bool is_wide = false;    // codes are words
    int summed = 0;          // numbers in each sum; 0: no sums
    bool is_flipped = false; // sums are whole numbers: those of the codes, times -128
    bool is_whole = false;   // floats: all products are summed in one chain, however many

    int64_t code_size() const { return is_wide ? 2 : 1; }
    int64_t scales() const { return k * code_size(); }
    int64_t sums() const { return scales() + k / GROUP * int64_t(sizeof(float)); }
    int64_t size() const {
        const int64_t n = sums() + (summed ? k / summed * int64_t(sizeof(float)) : 0);
        return (n + 63) / 64 * 64;
    }
};

// A group of numbers times a factor, each as the nearest whole number, ties to even. Products must be below 2^22.
#if defined(__AVX2__)
class Rounded {
public:
    Rounded(const float *x, float factor) {
        for (int i = 0; i < 4; ++i)
            codes_[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor)));
    }
    void store_bytes(char *to) const {
        const __m256i low = _mm256_packs_epi32(codes_[0], codes_[1]), high = _mm256_packs_epi32(codes_[2], codes_[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing works on halves
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                            _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    }
    // In the order of place_codes(): of four codes the first and the third, then the second and the fourth.
    void store_words(char *to) const {
        const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, //
                                               0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        for (int i = 0; i < 4; i += 2) {
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes_[i], codes_[i + 1]), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 16 * i), _mm256_shuffle_epi8(words, order));
        }
    }
    // The sum of all codes, or of the first or second 16.
    int32_t sum(int first, int n) const {
        __m256i sums = _mm256_add_epi32(codes_[first / 8], codes_[first / 8 + 1]);
        if (n == GROUP) sums = _mm256_add_epi32(sums, _mm256_add_epi32(codes_[2], codes_[3]));
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }

private:
    __m256i codes_[4];
};
#else
class Rounded {
public:
    Rounded(const float *x, float factor) {
        for (int i = 0; i < GROUP; ++i) {
            const float shifted = x[i] * factor + 12582912.0f; // 1.5 * 2^23: the bits below the point fall off
            int32_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            codes_[i] = (bits & 0x007fffff) - 0x00400000;
        }
    }
    void store_bytes(char *to) const {
        for (int i = 0; i < GROUP; ++i)
            to[i] = char(codes_[i]);
    }
    void store_words(char *to) const { // in the order of place_codes(), as above
        for (int i = 0; i < GROUP; i += 4) {
            const int32_t *x = codes_ + i;
            const int16_t words[] = {int16_t(x[0]), int16_t(x[2]), int16_t(x[1]), int16_t(x[3])};
            std::memcpy(to + 2 * i, words, sizeof words);
        }
    }
    int32_t sum(int first, int n) const {
        int32_t sum = 0;
        for (int i = first; i < first + n; ++i)
            sum += codes_[i];
        return sum;
    }

private:
    int32_t codes_[GROUP];
};
#endif

// The greatest of a group's numbers without their signs; NaN if there is one. As whole numbers, the bits of floats
// without signs are in the order of the floats, and NaN comes after infinity.
inline float greatest(const float *x) {
#if defined(__AVX2__)
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < GROUP; i += 8) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
#else
    int32_t bits[GROUP], highest = 0;
    std::memcpy(bits, x, sizeof bits);
    for (int32_t number : bits)
        highest = std::max(highest, number & 0x7fffffff);
    float result;
    std::memcpy(&result, &highest, sizeof result);
    return result;
#endif
}

// Rounds the groups [begin, end) of a row.
inline void round_row(const Layout &layout, const float *x, int64_t begin, int64_t end, char *row) {
    const float most = layout.is_wide ? 32767.0f : 127.0f;
    auto *scales = reinterpret_cast<float *>(row + layout.scales());
    auto *sums = reinterpret_cast<float *>(row + layout.sums());
    for (int64_t group = begin; group < end; ++group) {
        const float *numbers = x + group * GROUP;
        const float highest = greatest(numbers);
        // A NaN or an infinite number becomes the scale: all results of the row are NaN then.
        const float scale = std::isfinite(highest) ? highest / most : NAN;
        // A group of numbers so small that the factor would not be finite counts as zeros.
        const Rounded codes(numbers, highest > most * FLT_MIN ? most / highest : 0.0f);
        scales[group] = scale;
        if (layout.is_wide) codes.store_words(row + group * GROUP * 2);
        else codes.store_bytes(row + group * GROUP);
        for (int i = 0; i < GROUP && layout.summed; i += layout.summed) {
            const int32_t sum = codes.sum(i, layout.summed);
            const int64_t at = (group * GROUP + i) / layout.summed;
            if (layout.is_flipped) reinterpret_cast<int32_t *>(sums)[at] = -128 * sum;
            else reinterpret_cast<float *>(sums)[at] = scale * float(sum);
        }
    }
}

} // namespace
