// Tiles of the attention in attention.cpp: keys and values of 16 or 8 bits become floats, and are multiplied.
//
// Only attention.cpp includes this. Everything is in an anonymous namespace, because each variant of the CPU plugin is
// compiled with other instructions and must not use another one's functions.
#pragma once

#include "ggml-cpu-impl.h"
#include "ops.h"    // for CACHE_LINE_SIZE
#include "quants.h" // for block_q8_0
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>

namespace {

constexpr int TILE = 64; // cells that are converted at a time

// C[m x n] += A[m x k] * B[k x n], every element summed in the order of k, whatever m is.
#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
template <int M> void multiply_rows(float *c, const float *a, const float *b, int k, int n) {
    int j = 0;
    for (; j + GEMM_RN * GGML_F32_EPR <= n; j += GEMM_RN * GGML_F32_EPR)
        simd_gemm_ukernel<M, GEMM_RN>(c + j, a, b + j, k, n);
    for (; j + GGML_F32_EPR <= n; j += GGML_F32_EPR)
        simd_gemm_ukernel<M, 1>(c + j, a, b + j, k, n);
    if (j < n) simd_gemm_ukernel_tail<M>(c + j, a, b + j, k, n, n - j);
}

template <int M> void multiply_rest(float *c, const float *a, const float *b, int m, int k, int n) {
    if constexpr (M > 0) {
        if (m == M) {
            multiply_rows<M>(c, a, b, k, n);
        } else {
            multiply_rest<M - 1>(c, a, b, m, k, n);
        }
    }
}

void multiply(float *c, const float *a, const float *b, int m, int k, int n) {
    for (; m >= GEMM_RM; m -= GEMM_RM, a += GEMM_RM * k, c += GEMM_RM * n)
        multiply_rows<GEMM_RM>(c, a, b, k, n);
    multiply_rest<GEMM_RM - 1>(c, a, b, m, k, n);
}
#else
void multiply(float *c, const float *a, const float *b, int m, int k, int n) { simd_gemm(c, a, b, m, k, n); }
#endif

// How keys and values are stored: as numbers of 16 bits.
struct Half {
    // Converts n numbers of a row, from `first` on.
    static void convert(const char *row, int first, float *target, int n) {
        const auto *source = reinterpret_cast<const ggml_fp16_t *>(row) + first;
        int i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(target + i, eight(row, first + i));
#endif
        if (i < n) ggml_cpu_fp16_to_fp32(source + i, target + i, n - i);
    }

#if defined(__F16C__)
    static constexpr bool HAS_EIGHT = true;
    static __m256 eight(const char *row, int first) {
        const auto *source = reinterpret_cast<const ggml_fp16_t *>(row) + first;
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(source)));
    }
#endif
};

// How keys and values are stored: as blocks of 32 integers of 8 bits with a factor (q8_0).
struct Bytes {
    // Here, `first` is a multiple of a block.
    static void convert(const char *row, int first, float *target, int n) {
        for (int i = 0; i < n; i += QK8_0) {
            const block_q8_0 &block = reinterpret_cast<const block_q8_0 *>(row)[(first + i) / QK8_0];
            const float factor = GGML_CPU_FP16_TO_FP32(block.d);
            for (int j = 0; j < QK8_0; ++j)
                target[i + j] = float(block.qs[j]) * factor;
        }
    }

#if defined(__AVX2__) && defined(__F16C__)
    static constexpr bool HAS_EIGHT = true;
    static __m256 eight(const char *row, int first) {
        const block_q8_0 &block = reinterpret_cast<const block_q8_0 *>(row)[first / QK8_0];
        const auto *source = reinterpret_cast<const __m128i *>(block.qs + first % QK8_0);
        const __m256i integers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(source));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(block.d)));
    }
#elif defined(__F16C__)
    static constexpr bool HAS_EIGHT = false;
    static __m256 eight(const char *, int) { return _mm256_setzero_ps(); }
#endif
};

#if defined(__AVX__) && defined(__F16C__)
// Eight numbers of eight rows become eight columns.
template <typename Stored> void transpose_8x8(const char *const *rows, int first, float *target) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i)
        r[i] = Stored::eight(rows[i], first);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * TILE, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * TILE, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#endif

// Prefetches cells that will be needed soon. The hardware does not predict rows that are so far apart.
void prefetch(const char *const *rows, int n_cells, size_t n_bytes) {
#if defined(__GNUC__)
    for (int cell = 0; cell < n_cells; ++cell) {
        for (size_t i = 0; i < n_bytes; i += CACHE_LINE_SIZE)
            __builtin_prefetch(rows[cell] + i, 0, 2);
    }
#endif
}

// Converts keys to columns of floats. There are TILE columns; those behind the last cell are zero.
template <typename Stored> void load_keys(const char *const *rows, int n_cells, int n_embd, float *keys) {
    int cell = 0;
#if defined(__AVX__) && defined(__F16C__)
    if (Stored::HAS_EIGHT && n_embd % 8 == 0) {
        for (; cell + 8 <= n_cells; cell += 8) {
            for (int i = 0; i < n_embd; i += 8)
                transpose_8x8<Stored>(rows + cell, i, keys + i * TILE + cell);
        }
    }
#endif
    constexpr int PART = QK8_0;
    for (; cell < n_cells; ++cell) {
        for (int i = 0; i < n_embd; i += PART) {
            float part[PART];
            const int n = std::min(PART, n_embd - i);
            Stored::convert(rows[cell], i, part, n);
            for (int j = 0; j < n; ++j)
                keys[(i + j) * TILE + cell] = part[j];
        }
    }
    for (; cell < TILE; ++cell) {
        for (int i = 0; i < n_embd; ++i)
            keys[i * TILE + cell] = 0.0f;
    }
}

// Converts values to rows of floats. There are TILE rows; those behind the last cell are zero.
template <typename Stored> void load_values(const char *const *rows, int n_cells, int n_embd, float *values) {
    for (int cell = 0; cell < n_cells; ++cell)
        Stored::convert(rows[cell], 0, values + cell * n_embd, n_embd);
    std::fill_n(values + n_cells * n_embd, (TILE - n_cells) * n_embd, 0.0f);
}

} // namespace
