// Numbers of 16 bits to floats, one at a time: for machines that have no instructions for them.
#pragma once

#include "simd-mappings.h"

#include <cstdint>

namespace {

// 16 floats of the lower, or higher, 16 bits of as many dwords.
inline void low_halves(const uint32_t *x, float *to) {
    for (int i = 0; i < 16; ++i)
        to[i] = GGML_CPU_FP16_TO_FP32(uint16_t(x[i]));
}
inline void high_halves(const uint32_t *x, float *to) {
    for (int i = 0; i < 16; ++i)
        to[i] = GGML_CPU_FP16_TO_FP32(uint16_t(x[i] >> 16));
}

} // namespace
