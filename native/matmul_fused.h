// The product of a tile with a single row of activations: codes are multiplied as they are unpacked, and never stored.
//
// One stream needs every weight once for each token. Then storing a tile and loading it again would take as long as the
// products. The numbers are those of matmul_product.h, in the same order: whole numbers within a group, then floats.
#pragma once

#include "matmul_tile.h"

namespace {

// Sums of the groups of a chunk, while its codes are unpacked in any order. Sums of pairs have 16 bits, so a group may
// need several. They must be in registers: GCC keeps them there only if everything is inlined before it looks at them.
template <class Format> class GroupSums {
    using W = Way<Format>;
    static constexpr bool AS_PAIRS = !W::IS_WIDE && !HAS_DOT_BYTES;
    static constexpr int GROUPS = Format::CHUNK / Format::SCALED, COLUMNS_OF_GROUP = Format::SCALED / 4;
    static constexpr int AT_ONCE = AS_PAIRS ? std::min(W::PAIRS, COLUMNS_OF_GROUP) : COLUMNS_OF_GROUP;
    static constexpr int SHARES = COLUMNS_OF_GROUP / AT_ONCE;

public:
    // `x`: where the codes of the chunk are in the row of activations. `sums`: where its sums are.
    ALWAYS_INLINE GroupSums(const char *x, const float *sums) : x_(x) {
#pragma GCC unroll 16
        for (int group = 0; group < GROUPS; ++group)
#pragma GCC unroll 4
            for (int share = 0; share < SHARES; ++share)
                sums_[group][share] = W::IS_FLIPPED ? all_lanes(reinterpret_cast<const char *>(sums + group)) : no_ints();
    }

    // Adds the products with the codes of the weights from 4 * i to 4 * i + 3.
    ALWAYS_INLINE void add_codes(int i, Bytes codes) {
        Ints &sum = sums_[i / COLUMNS_OF_GROUP][i % COLUMNS_OF_GROUP / AT_ONCE];
        if constexpr (W::IS_FLIPPED) codes ^= 128;
        if constexpr (W::IS_WIDE) {
            const auto words = Words(codes);
            sum = dot_words(sum, load<Ints>(Words(words << 8) >> 8), all_lanes(x_ + i * 8));
            sum = dot_words(sum, load<Ints>(words >> 8), all_lanes(x_ + i * 8 + 4));
        } else if constexpr (HAS_DOT_BYTES) {
            sum = dot_bytes(sum, load<Ints>(codes), all_lanes(x_ + i * 4));
        } else {
            sum = add_pairs(sum, pair_up(load<Ints>(codes), all_lanes(x_ + i * 4)));
        }
    }

    ALWAYS_INLINE Ints of_group(int group) const {
        const Ints(&shares)[SHARES] = sums_[group];
        if constexpr (!AS_PAIRS) return shares[0];
        Ints sum = sum_pairs(shares[0]);
#pragma GCC unroll 4
        for (int share = 1; share < SHARES; ++share)
            sum = add(sum, sum_pairs(shares[share]));
        return sum;
    }

private:
    template <class To, class From> static To load(const From &x) {
        static_assert(sizeof(To) == sizeof(From));
        To y;
        std::memcpy(&y, &x, sizeof y);
        return y;
    }

    const char *x_;
    Ints sums_[GROUPS][SHARES];
};

template <class Format> void fused_product(const Weights &weights, const Layout &layout, const Row &x) {
    constexpr int N = Format::N, SCALED = Format::SCALED, CHUNK = Format::CHUNK, HEADS = 1024 / N;
    const Places places(weights);
    Prefetch prefetch(weights, weights.k / CHUNK);
    BlockHeads<Format, HEADS> heads;
    const char *codes = x.activations;
    const auto *x_scales = reinterpret_cast<const float *>(x.activations + layout.scales());
    const auto *x_sums = reinterpret_cast<const float *>(x.activations + layout.sums());
    Floats results[VECTORS];
#pragma GCC unroll 4
    for (Floats &result : results)
        result = no_floats();
    for (int64_t block = 0; block < weights.k / N; ++block) {
        if (block % HEADS == 0) heads.copy(places, block, std::min<int64_t>(HEADS, weights.k / N - block));
        const Blocks<typename Format::Block> blocks(places.of_rows, block);
        alignas(64) float scales[N / SCALED * TILE], offsets[N / SCALED * TILE];
        heads.scales(blocks, block % HEADS, scales, offsets);
        for (int chunk = 0; chunk < N / CHUNK; ++chunk) {
            prefetch.go_on();
            alignas(64) char columns[Format::COLUMNS * COLUMN];
            Format::gather(blocks, chunk, columns);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                GroupSums<Format> sums(codes, x_sums);
                Format::codes(columns + v * sizeof(Bytes), chunk, [&](int i, const Bytes &some) { sums.add_codes(i, some); });
#pragma GCC unroll 8
                for (int group = 0; group < CHUNK / SCALED; ++group) {
                    const int at = (chunk * CHUNK / SCALED + group) * TILE + v * LANES;
                    const Floats both = multiply(load_floats(scales + at), all_lanes(x_scales[group * SCALED / GROUP]));
                    results[v] = multiply_add(to_floats(sums.of_group(group)), both, results[v]);
                    if constexpr (Format::OFFSET)
                        results[v] = multiply_add(load_floats(offsets + at), all_lanes(x_sums[group]), results[v]);
                }
            }
            codes += CHUNK * (Way<Format>::IS_WIDE ? 2 : 1);
            x_scales += CHUNK / GROUP;
            x_sums += CHUNK / SCALED;
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
        store_floats(x.results + v * LANES, results[v]);
}

// The same for weights that are floats. Each eight columns are multiplied right after they were gathered: so the machine
// gathers the next ones while it still waits for a chain of additions.
template <class Format> void fused_product_of_floats(const Weights &weights, const Layout &layout, const Row &x) {
    using Number = typename Format::Number;
    const Places places(weights);
    Prefetch prefetch(weights, weights.k / 8 + 1);
    const auto *numbers = reinterpret_cast<const float *>(x.activations);
    Floats results[VECTORS], sums[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
        results[v] = sums[v] = no_floats();
    for (int64_t k = 0; k < weights.k; k += 8) {
        prefetch.go_on();
        alignas(64) char columns[8 * COLUMN];
        const int n = int(std::min<int64_t>(8, weights.k - k));
        gather_floats<Format>(places.of_rows, size_t(k) * sizeof(Number), n, columns);
        for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const auto *column = reinterpret_cast<const float *>(columns + i * COLUMN);
                sums[v] = multiply_add(load_floats(column + v * LANES), all_lanes(numbers[k + i]), sums[v]);
            }
        if (layout.is_whole || (k + 8) % CHAIN != 0) continue;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            results[v] = add(results[v], sums[v]);
            sums[v] = no_floats();
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
        store_floats(x.results + v * LANES, add(results[v], sums[v]));
}

} // namespace
