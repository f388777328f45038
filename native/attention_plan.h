// The plan of the attention in attention.cpp: which rows see which cells, and how the work is divided.
//
// Only attention.cpp includes this. Everything is in an anonymous namespace, because each variant of the CPU plugin is
// compiled with other instructions and must not use another one's functions.
#pragma once

#include "attention_tiles.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int CHUNK = 4 * TILE; // places that are summed on their own
constexpr int MAX_QUERIES = 64; // of a block: rows times heads
constexpr int UNITS_PER_THREAD = 4;
constexpr size_t MAX_PARTIALS = size_t(1) << 22; // floats: 16 MiB
constexpr uint16_t HIDDEN = 0xfc00;              // minus infinity in 16 bits; the rest of a mask is zero
constexpr int WORD = 64;                         // bits of a set of cells in one integer
constexpr int32_t NO_CELL = -1;                  // at a place

static_assert(TILE == WORD, "the cells of a tile are a set in one integer");

// The operands of one operation, and their sizes.
struct Attention {
    const ggml_tensor *q, *k, *v, *mask;
    const ggml_tensor *order; // or null: see patches/attention_order.cmake
    ggml_tensor *dst;
    const float *sinks; // a score for each head that takes weight and has no value; or null
    float scale;
    float soft_cap; // or 0: scores become soft_cap * tanh(score / soft_cap)
    int64_t n_embd_k, n_embd_v, n_rows, n_heads, n_kv_heads, n_cells, n_streams;
    int64_t group; // heads that share keys and values

    int64_t partial_size() const { return 2 + n_embd_v; }

    // The place of each cell in its sequence, and the sequence of each row. Null if they are not known.
    const int32_t *places(int64_t stream) const {
        if (order == nullptr) return nullptr;
        return static_cast<const int32_t *>(order->data) + (stream % order->ne[1]) * order->ne[0];
    }
    const int32_t *sequences(int64_t stream) const { return order == nullptr ? nullptr : places(stream) + n_cells; }

    // The number of the mask's content: no other content has had it. 0 if it is not known.
    int64_t number() const {
        int64_t result = 0;
        if (order != nullptr) std::memcpy(&result, sequences(0) + n_rows, sizeof result);
        return result;
    }
};

// The set of visible cells in up to WORD elements of a mask, a bit for each.
uint64_t visible_word(const ggml_fp16_t *mask, int n) {
    uint64_t bits = 0;
    int i = 0;
#if defined(__SSE2__)
    const __m128i hidden = _mm_set1_epi16(short(HIDDEN));
    for (; i + 16 <= n; i += 16) {
        const auto *source = reinterpret_cast<const __m128i *>(mask + i);
        const __m128i low = _mm_cmpeq_epi16(_mm_loadu_si128(source), hidden);
        const __m128i high = _mm_cmpeq_epi16(_mm_loadu_si128(source + 1), hidden);
        bits |= uint64_t(uint16_t(~_mm_movemask_epi8(_mm_packs_epi16(low, high)))) << i;
    }
#endif
    for (; i < n; ++i)
        bits |= uint64_t(mask[i] != HIDDEN) << i;
    return bits;
}

int lowest_bit(uint64_t word) {
#if defined(__GNUC__)
    return __builtin_ctzll(word);
#else
    int n = 0;
    for (; (word & 1) == 0; word >>= 1) ++n;
    return n;
#endif
}

// Of a word that may be 0: then it is -1.
int highest_bit(uint64_t word) {
#if defined(__GNUC__)
    return word == 0 ? -1 : 63 - __builtin_clzll(word);
#else
    int n = -1;
    for (; word != 0; word >>= 1) ++n;
    return n;
#endif
}

// Up to TILE places one after the other, as sets with a bit for each place: those where any row of the block sees a
// cell, and those where all rows do.
struct Tile {
    uint64_t any, all;
};

// Consecutive rows of one sequence, and the cells that any of them sees. If the sequences are not known: rows that see
// nearly the same cells.
struct Block {
    int64_t stream, first_row, end_row;
    std::vector<int32_t> cells;  // the cell at each place, from the beginning of a chunk on; or NO_CELL
    std::vector<Tile> tiles;

    int n_chunks() const { return int((tiles.size() * TILE + CHUNK - 1) / CHUNK); }
};

// The blocks of rows with their cells, and how they are divided among threads.
class Plan {
public:
    // What plans are made from. Equal keys give equal plans, if the number is known.
    using Key = std::array<int64_t, 8>;
    static Key key(const Attention &a, int n_threads) {
        return {a.number(), a.n_embd_v, a.n_rows, a.n_heads, a.n_kv_heads, a.n_cells, a.n_streams, n_threads};
    }
    bool suits(const Key &key) const { return key[0] != 0 && key == key_; }

    void make(const Attention &attention, int n_threads) {
        const Attention &a = attention;
        key_ = {}; // until it is finished
        n_words_ = size_t((a.n_cells + WORD - 1) / WORD);
        seen_.resize(size_t(a.n_streams * a.n_rows) * n_words_);
        n_blocks_ = 0;
        for (int64_t stream = 0; stream < a.n_streams; ++stream) {
            for (int64_t row = 0; row < a.n_rows; ++row)
                load_mask(a, stream, row);
            for (int64_t row = 0; row < a.n_rows;)
                row = add_block(a, stream, row);
        }
        n_chunks = 1;
        for (size_t i = 0; i < n_blocks_; ++i)
            n_chunks = std::max(n_chunks, int64_t(blocks_[i].n_chunks()));
        const auto n_partials = size_t(a.n_streams * a.n_rows * a.n_heads * n_chunks * a.partial_size());
        is_split = n_chunks > 1 && int64_t(n_blocks_) * a.n_kv_heads < UNITS_PER_THREAD * n_threads &&
                   n_partials <= MAX_PARTIALS;
        if (is_split && partials.size() < n_partials) partials.resize(n_partials);
        units.clear();
        for (size_t i = 0; i < n_blocks_; ++i) {
            const int n = blocks_[i].n_chunks();
            if (!is_split || n == 0) units.push_back({i, 0, n});
            for (int chunk = 0; is_split && chunk < n; ++chunk)
                units.push_back({i, chunk, chunk + 1});
        }
        key_ = key(a, n_threads);
    }

    const Block &block(size_t index) const { return blocks_[index]; }
    const uint64_t *seen(const Attention &a, int64_t stream, int64_t row) const {
        return seen_.data() + size_t(stream * a.n_rows + row) * n_words_;
    }
    size_t n_blocks() const { return n_blocks_; }

    struct Unit {
        size_t block;
        int first_chunk, end_chunk;
    };
    std::vector<Unit> units; // of work, each to be done for every head of keys
    int64_t n_chunks;        // of the block that has most
    bool is_split;           // a unit is one chunk, and its sums go to `partials`
    std::vector<float> partials;

private:
    void load_mask(const Attention &a, int64_t stream, int64_t row) {
        uint64_t *seen = seen_.data() + size_t(stream * a.n_rows + row) * n_words_;
        const auto *mask = reinterpret_cast<const ggml_fp16_t *>(static_cast<const char *>(a.mask->data) +
                                                                 size_t(row) * a.mask->nb[1] +
                                                                 size_t(stream % a.mask->ne[3]) * a.mask->nb[3]);
        for (size_t i = 0; i < n_words_; ++i)
            seen[i] = visible_word(mask + i * WORD, int(std::min(int64_t(WORD), a.n_cells - int64_t(i) * WORD)));
    }

    // Makes a block that begins with `row`. Returns the row after the block.
    int64_t add_block(const Attention &a, int64_t stream, int64_t row) {
        if (blocks_.size() == n_blocks_) blocks_.emplace_back();
        Block &block = blocks_[n_blocks_++];
        const int64_t end = std::min(a.n_rows, row + std::max(MAX_QUERIES / a.group, int64_t(1)));
        block.stream = stream;
        block.first_row = row;
        any_.assign(seen(a, stream, row), seen(a, stream, row) + n_words_);
        all_ = any_;
        for (++row; row < end && goes_on(a, stream, row); ++row) {
            const uint64_t *more = seen(a, stream, row);
            for (size_t i = 0; i < n_words_; ++i) {
                any_[i] |= more[i];
                all_[i] &= more[i];
            }
        }
        block.end_row = row;
        if (!lay_out(block, a.places(stream))) lay_out(block, nullptr);
        return row;
    }

    // Puts the cells of `any_` at their places. Without places, these are numbered as the cells are. Returns false if
    // the cells do not have places of their own, or have them far from each other.
    bool lay_out(Block &block, const int32_t *places) {
        int64_t lowest = INT32_MAX, highest = -1, n = 0;
        for_each_cell([&](int32_t cell) {
            const int64_t place = places == nullptr ? n : places[cell];
            lowest = std::min(lowest, place);
            highest = std::max(highest, place);
            ++n;
        });
        const int64_t begin = lowest / CHUNK * CHUNK, n_tiles = n == 0 ? 0 : (highest - begin) / TILE + 1;
        if (n != 0 && (lowest < 0 || n_tiles * TILE > 2 * (n + CHUNK))) return false;
        block.cells.assign(size_t(n_tiles * TILE), NO_CELL);
        block.tiles.assign(size_t(n_tiles), Tile{0, 0});
        int64_t next = 0;
        bool is_clear = true;
        for_each_cell([&](int32_t cell) {
            const auto place = size_t((places == nullptr ? next++ : places[cell]) - begin);
            Tile &tile = block.tiles[place / TILE];
            const uint64_t bit = uint64_t(1) << (place % TILE);
            is_clear = is_clear && (tile.any & bit) == 0;
            tile.any |= bit;
            if ((all_[size_t(cell) / WORD] >> (cell % WORD) & 1) != 0) tile.all |= bit;
            block.cells[place] = cell;
        });
        return is_clear;
    }

    // Calls visit(cell) for each cell of `any_`.
    template <typename Visit> void for_each_cell(Visit visit) const {
        for (size_t i = 0; i < n_words_; ++i) {
            for (uint64_t word = any_[i]; word != 0; word &= word - 1)
                visit(int32_t(i) * WORD + lowest_bit(word));
        }
    }

    // Whether a row belongs to the block of the row before it.
    bool goes_on(const Attention &a, int64_t stream, int64_t row) const {
        const int32_t *sequences = a.sequences(stream);
        return sequences != nullptr ? sequences[row] == sequences[row - 1]
                                    : sees_as_much(seen(a, stream, row - 1), seen(a, stream, row));
    }

    // Whether a row that sees `seen` sees all that the row before it saw, except cells before the first one that it
    // sees (a sliding window).
    bool sees_as_much(const uint64_t *before, const uint64_t *seen) const {
        bool has_begun = false;
        for (size_t i = 0; i < n_words_; ++i) {
            uint64_t lost = before[i] & ~seen[i];
            if (!has_begun && seen[i] != 0) {
                has_begun = true;
                lost &= ~uint64_t(0) << lowest_bit(seen[i]);
            }
            if (has_begun && lost != 0) return false;
        }
        return has_begun;
    }

    Key key_{};
    size_t n_words_, n_blocks_;
    std::vector<uint64_t> seen_;       // sets of cells, a bit for each: those that each row sees,
    std::vector<uint64_t> any_, all_;  // and those that any row of a block sees, and all rows
    std::vector<Block> blocks_;        // may be more than n_blocks_: their memory is used again
};

// The plans of one thread. All layers of a graph can use the same one, or one of two if some have a sliding window.
class Plans {
public:
    Plan &find(const Attention &attention, int n_threads) {
        const Plan::Key key = Plan::key(attention, n_threads);
        if (plans_[last_].suits(key)) return plans_[last_];
        last_ = 1 - last_;
        if (!plans_[last_].suits(key)) plans_[last_].make(attention, n_threads);
        return plans_[last_];
    }

private:
    Plan plans_[2];
    int last_ = 0;
};

} // namespace
