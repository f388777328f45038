// What a product works on: a tile of 16 rows of weights, and rows of activations.
#pragma once

#if defined(MATMUL_VECTORS) // tests choose
#include MATMUL_VECTORS
#elif defined(__AVX512F__) && defined(__AVX512BW__)
#include "matmul_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "matmul_avx2.h"
#elif defined(__x86_64__)
#include "matmul_sse.h"
#elif defined(__aarch64__)
#include "matmul_neon.h"
#else
#include "matmul_portable.h"
#endif

#include "matmul_activations.h"
#include "matmul_formats.h"

namespace {

constexpr int VECTORS = TILE / LANES;

// A row of activations, and where its results go: one for each row of weights.
struct Row {
    const char *activations;
    float *results;
};

// The weights of a product: TILE rows or fewer, `stride` bytes apart, of `k` numbers each.
struct Weights {
    const char *data;
    size_t stride;
    int n;
    int64_t k;
    const char *next; // the weights that will probably be wanted next, or null
};

// Fetches the next weights into the cache while these are unpacked, as many bytes in each step as it reads itself. The
// machine would not guess where to read on: a tile is read from 16 places in turns.
class Prefetch {
public:
    Prefetch(const Weights &weights, int64_t n_steps)
        : at_(weights.next), step_(weights.next == nullptr ? 0 : TILE * weights.stride / size_t(n_steps)) {}
    void go_on() {
        const char *end = at_ + step_;
        for (; done_ < end; done_ += 64)
            __builtin_prefetch(done_);
        at_ = end;
    }

private:
    const char *at_;
    size_t step_;
    const char *done_ = at_;
};

// How the codes of a format are multiplied on this machine.
template <class Format> struct Way {
    // As words, where such bytes cannot be multiplied.
    static constexpr bool IS_WIDE = !HAS_DOT_BYTES && (Format::SIGNED || !HAS_PAIRS);
    // By adding 128 to codes with signs, where the weights of a product of bytes have none. What that adds to the whole
    // numbers of a row is taken off beforehand: round_row has put it where other formats have their sums.
    static constexpr bool IS_FLIPPED = Format::SIGNED && HAS_DOT_BYTES && WEIGHTS_ARE_UNSIGNED;
    static_assert(!IS_FLIPPED || !Format::OFFSET);
    // Products of bytes that fit into the 16 bits of a pair: 2 * 127 * MAX each.
    static constexpr int PAIRS = 32767 / (2 * 127 * Format::MAX);
    static constexpr int SCALED = Format::SCALED;
    static constexpr int STEPS = SCALED / (IS_WIDE ? 2 : 4); // lanes of codes in a group
};

// Where the rows of a tile are. Rows that it lacks are its last one again.
struct Places {
    const char *of_rows[TILE];

    explicit Places(const Weights &weights) {
        for (int row = 0; row < TILE; ++row)
            of_rows[row] = weights.data + size_t(std::min(row, weights.n - 1)) * weights.stride;
    }
};

constexpr int64_t CHAIN = 64; // products of floats that are summed on their own: long sums lose digits

// Columns of n <= 8 floats, which begin `at` bytes after the beginning of each row. Reads nothing behind them.
template <class Format> void gather_floats(const char *const (&rows)[TILE], size_t at, int n, char *columns) {
    if (n == 8) {
        Format::gather(rows, at, columns);
        return;
    }
    typename Format::Number last[TILE][8] = {};
    const char *of_rows[TILE];
    for (int row = 0; row < TILE; ++row) {
        std::memcpy(last[row], rows[row] + at, size_t(n) * sizeof last[row][0]);
        of_rows[row] = reinterpret_cast<const char *>(last[row]);
    }
    Format::gather(of_rows, 0, columns);
}

// The heads of consecutive blocks of a tile, for the formats that have them. They are copied by instructions that the
// units for vectors do not see, and early: a vector that is loaded right after its parts were stored has to wait.
template <class Format, int MOST> class BlockHeads {
public:
    void copy(const Places &places, int64_t first_block, int64_t n) {
        if constexpr (Format::HAS_HEADS)
            for (int row = 0; row < TILE; ++row) {
                const char *from = places.of_rows[row] + size_t(first_block) * sizeof(typename Format::Block);
                for (int64_t block = 0; block < n; ++block, from += sizeof(typename Format::Block))
                    std::memcpy(heads_ + block * TILE + row, from, sizeof(uint32_t));
            }
    }
    // The scales and offsets of a block, which is the one with this number among those whose heads were copied.
    void scales(const Blocks<typename Format::Block> &blocks, int64_t block, float *scales, float *offsets) const {
        if constexpr (Format::HAS_HEADS) Format::scales(heads_ + block * TILE, scales, offsets);
        else Format::scales(blocks, scales, offsets);
    }

private:
    alignas(64) uint32_t heads_[Format::HAS_HEADS ? MOST * TILE : 1];
};

} // namespace
