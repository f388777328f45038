// Products of a tile of 16 rows of weights with rows of activations.
//
// docs/internals.md has the picture. A tile is unpacked into the cache, a part of its length at a time, and then
// multiplied with all rows, a few at once. In a tile, the 16 rows are the lanes of vectors: for each four numbers of k
// (for floats: each one), 16 lanes of 32 bits lie one after the other.
//
// Every result is one chain of additions: within a group of weights that share a scale, whole numbers are summed, so
// their order does not matter; then the groups are added as floats in the order of k. (Weights that are floats are summed
// in chains of 64, which are added in the order of k; but in a single chain where the graph computes them, too.) Nothing
// else is added, so a row's results do not depend, to the last bit, on how many rows are beside it, which thread computes
// it, or where a part ends.
#pragma once

#include "matmul_fused.h"
#include "matmul_tile.h"

namespace {

// A part of a tile, unpacked.
template <class Format> struct Part {
    static constexpr int K = Way<Format>::IS_WIDE ? 512 : 1024;
    static constexpr int GROUPS = K / Format::SCALED;
    alignas(64) char codes[TILE * K * (Way<Format>::IS_WIDE ? 2 : 1)];
    alignas(64) float scales[GROUPS * TILE];
    alignas(64) float offsets[Format::OFFSET ? GROUPS * TILE : 1];
};

// Puts the codes of four weights of some rows into their place in a part: as bytes, or as words, the first and the third,
// then the second and the fourth.
template <class Format> void place_codes(Bytes x, int vector, char *column) {
    if constexpr (Way<Format>::IS_WIDE) {
        const auto words = Words(x);
        store(column + vector * sizeof x, Words(words << 8) >> 8);
        store(column + COLUMN + vector * sizeof x, words >> 8);
    } else {
        if constexpr (Way<Format>::IS_FLIPPED) x ^= 128;
        store(column + vector * sizeof x, x);
    }
}

// Unpacks `n_k` numbers of each row, from number `from` on.
template <class Format>
void unpack(const Weights &weights, int64_t from, int64_t n_k, Part<Format> &part, Prefetch &prefetch) {
    constexpr int N = Format::N, GROUPS = N / Format::SCALED, CODE_SIZE = Way<Format>::IS_WIDE ? 2 : 1;
    const Places places(weights);
    BlockHeads<Format, Part<Format>::K / N> heads;
    heads.copy(places, from / N, n_k / N);
    char *to = part.codes;
    for (int64_t block = 0; block < n_k / N; ++block) {
        const Blocks<typename Format::Block> blocks(places.of_rows, from / N + block);
        float *scales = part.scales + block * GROUPS * TILE, *offsets = part.offsets + block * GROUPS * TILE;
        heads.scales(blocks, block, scales, offsets);
        for (int chunk = 0; chunk < N / Format::CHUNK; ++chunk, to += Format::CHUNK * TILE * CODE_SIZE) {
            prefetch.go_on();
            alignas(64) char columns[Format::COLUMNS * COLUMN];
            Format::gather(blocks, chunk, columns);
            for (int v = 0; v < VECTORS; ++v)
                Format::codes(columns + v * sizeof(Bytes), chunk, [&](int i, const Bytes &x) {
                    place_codes<Format>(x, v, to + i * COLUMN * CODE_SIZE);
                });
        }
    }
}

// The sum over one group of weights that share a scale: whole numbers, so exact. `at` and `sum_at`: where its codes and
// its sum are in a row of activations.
template <class Format, int N_ROWS>
inline void sum_group(const char *codes, const char *const *activations, int64_t at, [[maybe_unused]] int64_t sum_at,
                      Ints (&sums)[N_ROWS][VECTORS]) {
    using W = Way<Format>;
#pragma GCC unroll 16
    for (int row = 0; row < N_ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v)
            sums[row][v] = W::IS_FLIPPED ? all_lanes(activations[row] + sum_at) : no_ints();
    if constexpr (W::IS_WIDE || HAS_DOT_BYTES) {
#pragma GCC unroll 16
        for (int step = 0; step < W::STEPS; ++step) {
            Ints weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                weights[v] = load_ints(codes + (step * VECTORS + v) * LANES * 4);
#pragma GCC unroll 16
            for (int row = 0; row < N_ROWS; ++row) {
                const Ints x = all_lanes(activations[row] + at + step * 4);
                for (int v = 0; v < VECTORS; ++v)
                    sums[row][v] = W::IS_WIDE ? dot_words(sums[row][v], weights[v], x)
                                              : dot_bytes(sums[row][v], weights[v], x);
                for (int v = 0; v < VECTORS; ++v)
                    settle(sums[row][v]);
            }
        }
    } else {
        constexpr int AT_ONCE = std::min(W::PAIRS, W::STEPS);
        static_assert(AT_ONCE >= 1 && W::STEPS % AT_ONCE == 0);
#pragma GCC unroll 4
        for (int first = 0; first < W::STEPS; first += AT_ONCE) {
            Ints pairs[N_ROWS][VECTORS];
#pragma GCC unroll 16
            for (int step = 0; step < AT_ONCE; ++step) {
                Ints weights[VECTORS];
                for (int v = 0; v < VECTORS; ++v)
                    weights[v] = load_ints(codes + ((first + step) * VECTORS + v) * LANES * 4);
#pragma GCC unroll 16
                for (int row = 0; row < N_ROWS; ++row) {
                    const Ints x = all_lanes(activations[row] + at + (first + step) * 4);
                    for (int v = 0; v < VECTORS; ++v) {
                        const Ints products = pair_up(weights[v], x);
                        pairs[row][v] = step == 0 ? products : add_pairs(pairs[row][v], products);
                        settle(pairs[row][v]);
                    }
                }
            }
#pragma GCC unroll 16
            for (int row = 0; row < N_ROWS; ++row)
                for (int v = 0; v < VECTORS; ++v)
                    sums[row][v] = add(sums[row][v], sum_pairs(pairs[row][v]));
        }
    }
}

// Hides from the compiler where x comes from. It would else keep a pointer for each address that is made of x, which
// takes more registers than there are.
inline void hide(int64_t &x) { asm volatile("" : "+r"(x)); }

// Multiplies a part with some rows, and adds that to their results. With `is_first`, results begin with zero.
// Loops over rows must be unrolled early, or GCC keeps arrays of vectors in memory.
template <class Format, int N_ROWS>
void multiply(const Part<Format> &part, int64_t from, int64_t n_k, const Layout &layout, const Row *rows, bool is_first) {
    using W = Way<Format>;
    constexpr int SCALED = W::SCALED;
    constexpr auto FLOAT = int64_t(sizeof(float));
    const char *x[N_ROWS];
    Floats results[N_ROWS][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < N_ROWS; ++row) {
        x[row] = rows[row].activations;
        for (int v = 0; v < VECTORS; ++v)
            results[row][v] = is_first ? no_floats() : load_floats(rows[row].results + v * LANES);
    }
    const int64_t code_size = layout.code_size(), first_scale = layout.scales() + from / GROUP * FLOAT;
    int64_t codes_at = from * code_size, sum_at = layout.sums() + from / SCALED * FLOAT; // in a row of activations
    for (int64_t group = 0; group < n_k / SCALED; ++group, codes_at += SCALED * code_size, sum_at += FLOAT) {
        int64_t scale_at = first_scale + group * SCALED / GROUP * FLOAT;
        hide(codes_at), hide(sum_at), hide(scale_at);
        Ints sums[N_ROWS][VECTORS];
        sum_group<Format>(part.codes + group * SCALED * TILE * code_size, x, codes_at, sum_at, sums);
        for (int v = 0; v < VECTORS; ++v) {
            const Floats scale = load_floats(part.scales + group * TILE + v * LANES);
#pragma GCC unroll 16
            for (int row = 0; row < N_ROWS; ++row) {
                const Floats both = multiply(scale, all_lanes(*reinterpret_cast<const float *>(x[row] + scale_at)));
                results[row][v] = multiply_add(to_floats(sums[row][v]), both, results[row][v]);
            }
            if constexpr (Format::OFFSET) {
                const Floats offset = load_floats(part.offsets + group * TILE + v * LANES);
#pragma GCC unroll 16
                for (int row = 0; row < N_ROWS; ++row) {
                    const Floats sum = all_lanes(*reinterpret_cast<const float *>(x[row] + sum_at));
                    results[row][v] = multiply_add(offset, sum, results[row][v]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < N_ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v)
            store_floats(rows[row].results + v * LANES, results[row][v]);
}

// Floats: a part of a tile is as many columns of 16.
struct FloatPart {
    static constexpr int K = 256;
    alignas(64) float columns[K * TILE];
};

template <class Format>
void unpack(const Weights &weights, int64_t from, int64_t n_k, FloatPart &part, Prefetch &prefetch) {
    const Places places(weights);
    auto *columns = reinterpret_cast<char *>(part.columns);
    for (int64_t k = 0; k < n_k; k += 8) {
        prefetch.go_on();
        gather_floats<Format>(places.of_rows, size_t(from + k) * sizeof(typename Format::Number),
                              int(std::min<int64_t>(8, n_k - k)), columns + k * COLUMN);
    }
}

// Multiplies a part of floats with some rows. With `is_whole`, sums go on from the results; else
// each CHAIN of products is summed on its own.
template <int N_ROWS>
void multiply(const FloatPart &part, int64_t from, int64_t n_k, const Row *rows, bool is_first, bool is_whole) {
    static_assert(FloatPart::K % CHAIN == 0);
    const float *numbers[N_ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < N_ROWS; ++row)
        numbers[row] = reinterpret_cast<const float *>(rows[row].activations) + from;
    for (int64_t begin = 0; begin < n_k; begin += CHAIN) {
        Floats sums[N_ROWS][VECTORS];
#pragma GCC unroll 16
        for (int row = 0; row < N_ROWS; ++row)
            for (int v = 0; v < VECTORS; ++v)
                sums[row][v] = is_whole && !(is_first && begin == 0) ? load_floats(rows[row].results + v * LANES)
                                                                     : no_floats();
        for (int64_t k = begin, end = std::min(begin + CHAIN, n_k); k < end; ++k) {
            Floats weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                weights[v] = load_floats(part.columns + k * TILE + v * LANES);
#pragma GCC unroll 16
            for (int row = 0; row < N_ROWS; ++row) {
                const Floats x = all_lanes(numbers[row][k]);
                for (int v = 0; v < VECTORS; ++v)
                    sums[row][v] = multiply_add(weights[v], x, sums[row][v]);
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < N_ROWS; ++row)
            for (int v = 0; v < VECTORS; ++v) {
                float *results = rows[row].results + v * LANES;
                const Floats before = is_whole || (is_first && begin == 0) ? no_floats() : load_floats(results);
                store_floats(results, add(before, sums[row][v]));
            }
    }
}

// Calls f(std::integral_constant<int, n>), where n is from 1 to MOST.
template <int MOST, class F> void call_with(int n, F f) {
    if constexpr (MOST > 1)
        if (n < MOST) return call_with<MOST - 1>(n, f);
    f(std::integral_constant<int, MOST>{});
}

// Calls `multiply_rows(std::integral_constant<int, n>, rows)` with at most MOST rows each time, until all are done. The
// last two calls share what is left: a row on its own would cost as much as two.
template <int MOST, class F> void by_rows(const Row *rows, int64_t n_rows, F multiply_rows) {
    while (n_rows > 0) {
        const int64_t n = n_rows <= MOST ? n_rows : n_rows < 2 * MOST ? (n_rows + 1) / 2 : MOST;
        call_with<MOST>(int(n), [&](auto constant) { multiply_rows(constant, rows); });
        rows += n;
        n_rows -= n;
    }
}

template <class Format>
void product(const Weights &weights, const Layout &layout, const Row *rows, int64_t n_rows) {
    // With words and short groups, the sums of a chunk are more than the registers hold.
    constexpr bool IS_FUSED = !Way<Format>::IS_WIDE || Format::SCALED == GROUP;
    if (IS_FUSED && n_rows == 1) {
        fused_product<Format>(weights, layout, *rows);
        return;
    }
    static thread_local Part<Format> part;
    Prefetch prefetch(weights, weights.k / Format::CHUNK);
    for (int64_t from = 0; from < weights.k; from += part.K) {
        const int64_t n_k = std::min<int64_t>(part.K, weights.k - from);
        unpack<Format>(weights, from, n_k, part, prefetch);
        by_rows<ROWS_OF_INTS>(rows, n_rows, [&](auto n, const Row *some) {
            multiply<Format, n>(part, from, n_k, layout, some, from == 0);
        });
    }
}

template <class Format>
void product_of_floats(const Weights &weights, const Layout &layout, const Row *rows, int64_t n_rows) {
    if (n_rows == 1) {
        fused_product_of_floats<Format>(weights, layout, *rows);
        return;
    }
    static thread_local FloatPart part;
    Prefetch prefetch(weights, weights.k / 8 + 1);
    for (int64_t from = 0; from < weights.k; from += part.K) {
        const int64_t n_k = std::min<int64_t>(part.K, weights.k - from);
        unpack<Format>(weights, from, n_k, part, prefetch);
        by_rows<ROWS_OF_FLOATS>(rows, n_rows, [&](auto n, const Row *some) {
            multiply<n>(part, from, n_k, some, from == 0, layout.is_whole);
        });
    }
}

// A type of weights: what it needs of a row of activations, and its product. Results are written 16 at a time.
struct Product {
    void (*run)(const Weights &, const Layout &, const Row *, int64_t n_rows);
    bool takes_floats;
    bool is_wide;
    int summed;
    bool is_flipped;
};

template <class Format> constexpr Product product_of() {
    using W = Way<Format>;
    return {product<Format>, false, W::IS_WIDE, Format::OFFSET || W::IS_FLIPPED ? W::SCALED : 0, W::IS_FLIPPED};
}

inline const Product *find_product(ggml_type type) {
    static const Product f32{product_of_floats<F32>, true, false, 0, false}, f16{product_of_floats<F16>, true, false, 0, false},
        bf16{product_of_floats<BF16>, true, false, 0, false}, q4_0 = product_of<Q4_0>(), q4_1 = product_of<Q4_1>(),
        q5_0 = product_of<Q5_0>(), q5_1 = product_of<Q5_1>(), q8_0 = product_of<Q8_0>(), q2_k = product_of<Q2_K>(),
        q3_k = product_of<Q3_K>(), q4_k = product_of<Q4_K>(), q5_k = product_of<Q5_K>(), q6_k = product_of<Q6_K>(),
        iq4_nl = product_of<IQ4_NL>(), iq4_xs = product_of<IQ4_XS>(), mxfp4 = product_of<MXFP4>();
    switch (type) {
        case GGML_TYPE_F32: return &f32;
        case GGML_TYPE_F16: return &f16;
        case GGML_TYPE_BF16: return &bf16;
        case GGML_TYPE_Q4_0: return &q4_0;
        case GGML_TYPE_Q4_1: return &q4_1;
        case GGML_TYPE_Q5_0: return &q5_0;
        case GGML_TYPE_Q5_1: return &q5_1;
        case GGML_TYPE_Q8_0: return &q8_0;
        case GGML_TYPE_Q2_K: return &q2_k;
        case GGML_TYPE_Q3_K: return &q3_k;
        case GGML_TYPE_Q4_K: return &q4_k;
        case GGML_TYPE_Q5_K: return &q5_k;
        case GGML_TYPE_Q6_K: return &q6_k;
        case GGML_TYPE_IQ4_NL: return &iq4_nl;
        case GGML_TYPE_IQ4_XS: return &iq4_xs;
        case GGML_TYPE_MXFP4: return &mxfp4;
        default: return nullptr;
    }
}

} // namespace
