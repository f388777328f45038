// Attention on a CPU, in the place of ggml's own, for the usual case: keys and values of 16 or 8 bits, and a mask.
//
// ggml has one kernel for a single row, one for up to 63 rows, and one for more. Several streams, and a prompt beside
// them, run on the one in the middle. That one converts every key and value again for every row and head, and sums in
// 16 bits: with 1,800 cells a row takes four times as long as in the third kernel, and the result differs from the
// others' in the third digit. This one is for any number of rows:
//
// - A tile of keys and values is converted once for all rows of a sequence and all heads of a group (GQA).
// - The result of a row depends on the cells that it sees and on their places in its sequence, to the last bit. It does
//   not depend on other rows, other cells, where in the KV cache its cells lie, or the number of threads.
//
// A place is a position, usually: patches/attention_order.cmake says how this file learns of it. A tile consists of the
// cells of TILE places, from a multiple of TILE on. A cell is at the same place of the same tile for every row that
// ever sees it. Cells that a row does not see get the weight 0, which changes no sum; so do places where there is no
// cell, as before a sliding window. Tiles are summed in chunks of a fixed size, which also begin at multiples of their
// size. The chunks are merged one after the other, whichever thread computed them. All of this holds for any number of
// rows, because every element of a product is summed in the same order (attention_tiles.h).
//
// If places are not known (masks that a model computes), two cells have the same, or most places have no cell, cells are
// numbered as they lie. Then the result of a row also depends on the other rows of its block.
//
// Patches of an image all see each other, without a mask. They are left to ggml's third kernel, which is quicker then.
//
// The online softmax over tiles is that of FlashAttention (https://arxiv.org/abs/2205.14135); chunks are merged as in
// Flash-Decoding (https://pytorch.org/blog/flash-decoding).
//
// patches/attention.cmake compiles this into every variant of the CPU plugin and renames ggml's own function, which
// does everything else. TRIO_RUNNER_ATTENTION=ggml in the environment leaves everything to ggml's function.

#include "attention_plan.h"
#include "attention_tiles.h"
#include "common.h"
#include "ggml-cpu-impl.h"
#include "ops.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" void ggml_flash_attn_ext_upstream(const ggml_compute_params *params, ggml_tensor *dst);

namespace {

// Whether keys or values are stored in a way that attention_tiles.h can convert.
bool is_known(const ggml_tensor *tensor) {
    return (tensor->type == GGML_TYPE_F16 || tensor->type == GGML_TYPE_Q8_0) &&
           tensor->nb[0] == ggml_type_size(tensor->type);
}

// Whether this file computes the operation. Otherwise ggml's own function does.
bool is_usual(const ggml_compute_params *params, const ggml_tensor *dst) {
    static const bool is_enabled = [] {
        const char *choice = std::getenv("TRIO_RUNNER_ATTENTION");
        return choice == nullptr || std::strcmp(choice, "ggml") != 0;
    }();
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    float max_bias;
    std::memcpy(&max_bias, dst->op_params + 1, sizeof max_bias);
    return is_enabled && !params->use_ref && max_bias == 0.0f &&
           q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && is_known(k) && is_known(v) &&
           k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[2] % k->ne[2] == 0 &&
           q->ne[3] % k->ne[3] == 0 && q->ne[2] / k->ne[2] <= MAX_QUERIES &&
           mask != nullptr && mask->type == GGML_TYPE_F16 && mask->ne[2] == 1;
}

Attention describe(ggml_tensor *dst) {
    Attention a{};
    a.q = dst->src[0];
    a.k = dst->src[1];
    a.v = dst->src[2];
    a.mask = dst->src[3];
    a.dst = dst;
    a.sinks = dst->src[4] == nullptr ? nullptr : static_cast<const float *>(dst->src[4]->data);
    std::memcpy(&a.scale, dst->op_params, sizeof a.scale);
    std::memcpy(&a.soft_cap, dst->op_params + 2, sizeof a.soft_cap);
    if (a.soft_cap != 0.0f) a.scale /= a.soft_cap;
    a.n_embd_k = a.k->ne[0];
    a.n_embd_v = a.v->ne[0];
    a.n_rows = a.q->ne[1];
    a.n_heads = a.q->ne[2];
    a.n_streams = a.q->ne[3];
    a.n_cells = a.k->ne[1];
    a.n_kv_heads = a.k->ne[2];
    a.group = a.n_heads / a.n_kv_heads;
    const ggml_tensor *order = dst->src[5];
    if (order != nullptr && order->type == GGML_TYPE_I32 && order->ne[0] == a.n_cells + a.n_rows + 2) a.order = order;
    return a;
}

// The sums over some cells: for each query the highest score, the sum of weights, and the weighted sum of values.
struct Sums {
    float highest[MAX_QUERIES];
    float weight[MAX_QUERIES];
    float *values;

    void clear(int64_t n_queries, int64_t n_embd) {
        std::fill_n(highest, n_queries, -INFINITY);
        std::fill_n(weight, n_queries, 0.0f);
        std::fill_n(values, n_queries * n_embd, 0.0f);
    }
};

// Adds the sums of one query over one more chunk. To be called in the order of the chunks, for equal results.
void merge(float &highest, float &weight, float *values, float chunk_highest, float chunk_weight,
           const float *chunk_values, int64_t n_embd) {
    if (chunk_weight == 0.0f) return;
    const float new_highest = std::max(highest, chunk_highest);
    const float before = std::exp(highest - new_highest), more = std::exp(chunk_highest - new_highest);
    for (int64_t i = 0; i < n_embd; ++i)
        values[i] = values[i] * before + chunk_values[i] * more;
    weight = weight * before + chunk_weight * more;
    highest = new_highest;
}

class Worker {
public:
    Worker(const Attention &attention, Plan &plan, const Plan::Unit &unit, int64_t kv_head)
        : load_keys_(attention.k->type == GGML_TYPE_F16 ? load_keys<Half> : load_keys<Bytes>),
          load_values_(attention.v->type == GGML_TYPE_F16 ? load_values<Half> : load_values<Bytes>),
          a_(attention), plan_(plan), unit_(unit), block_(plan.block(unit.block)), s_(scratch(attention)),
          kv_head_(kv_head), n_rows_(block_.end_row - block_.first_row) {}

    void run() {
        const int64_t n_queries = n_rows_ * a_.group;
        load_queries();
        s_.total.clear(n_queries, a_.n_embd_v);
        for (int chunk = unit_.first_chunk; chunk < unit_.end_chunk; ++chunk) {
            s_.chunk.clear(n_queries, a_.n_embd_v);
            attend(chunk);
            if (plan_.is_split) {
                store_partials(chunk);
                return;
            }
            for (int64_t i = 0; i < n_queries; ++i)
                merge(s_.total.highest[i], s_.total.weight[i], s_.total.values + i * a_.n_embd_v,
                      s_.chunk.highest[i], s_.chunk.weight[i], s_.chunk.values + i * a_.n_embd_v, a_.n_embd_v);
        }
        store(); // also if the rows see no cells: zeros
    }

private:
    struct Scratch {
        std::vector<float> floats;
        std::vector<ggml_fp16_t> zeros;
        float *keys, *values, *queries, *scores;
        Sums chunk, total;
    };

    // This thread's, made large enough.
    static Scratch &scratch(const Attention &a) {
        static thread_local Scratch s;
        const size_t n_tile = size_t(TILE) * size_t(a.n_embd_k + a.n_embd_v);
        const size_t n_query = size_t(MAX_QUERIES) * size_t(a.n_embd_k + 2 * a.n_embd_v + TILE);
        if (s.floats.size() < n_tile + n_query) s.floats.resize(n_tile + n_query);
        const auto n_zeros = size_t(std::max(a.n_embd_k, a.n_embd_v));
        if (s.zeros.size() < n_zeros) s.zeros.resize(n_zeros, 0);
        s.keys = s.floats.data();
        s.values = s.keys + TILE * a.n_embd_k;
        s.queries = s.values + TILE * a.n_embd_v;
        s.scores = s.queries + MAX_QUERIES * a.n_embd_k;
        s.chunk.values = s.scores + MAX_QUERIES * TILE;
        s.total.values = s.chunk.values + MAX_QUERIES * a.n_embd_v;
        return s;
    }

    int64_t head(int64_t query) const { return kv_head_ * a_.group + query % a_.group; }
    int64_t row(int64_t query) const { return block_.first_row + query / a_.group; }
    int64_t kv_stream() const { return block_.stream / (a_.n_streams / a_.k->ne[3]); }

    // Queries are ordered by row, and by head within a row.
    void load_queries() {
        for (int64_t i = 0; i < n_rows_ * a_.group; ++i) {
            const size_t offset = size_t(row(i)) * a_.q->nb[1] + size_t(head(i)) * a_.q->nb[2] +
                                  size_t(block_.stream) * a_.q->nb[3];
            const auto *q = reinterpret_cast<const float *>(static_cast<const char *>(a_.q->data) + offset);
            for (int64_t j = 0; j < a_.n_embd_k; ++j)
                s_.queries[i * a_.n_embd_k + j] = q[j] * a_.scale;
        }
    }

    void attend(int chunk) {
        constexpr int CHUNK_TILES = CHUNK / TILE;
        const int first = chunk * CHUNK_TILES, end = std::min(first + CHUNK_TILES, int(block_.tiles.size()));
        const char *keys[CHUNK], *values[CHUNK];
        find_rows(a_.k, first, end, keys);
        find_rows(a_.v, first, end, values);
        for (int tile = first; tile < end; ++tile) {
            const char **tile_keys = keys + (tile - first) * TILE, **tile_values = values + (tile - first) * TILE;
            if (tile + 1 < end) {
                const int n_next = n_places(tile + 1);
                prefetch(tile_keys + TILE, n_next, ggml_row_size(a_.k->type, a_.n_embd_k));
                prefetch(tile_values + TILE, n_next, ggml_row_size(a_.v->type, a_.n_embd_v));
            }
            const int n = n_places(tile);
            if (n == 0) continue;
            load_keys_(tile_keys, n, int(a_.n_embd_k), s_.keys);
            load_values_(tile_values, n, int(a_.n_embd_v), s_.values);
            attend_tile(tile);
        }
    }

    // The places of a tile up to the last one with a cell.
    int n_places(int tile) const { return highest_bit(block_.tiles[size_t(tile)].any) + 1; }

    // The key or value at each place of some tiles. Where there is no cell, it is zero.
    void find_rows(const ggml_tensor *tensor, int first_tile, int end_tile, const char **rows) const {
        const char *start = static_cast<const char *>(tensor->data) + size_t(kv_head_) * tensor->nb[2] +
                            size_t(kv_stream()) * tensor->nb[3];
        const auto *zero = reinterpret_cast<const char *>(s_.zeros.data());
        const int32_t *cells = block_.cells.data() + first_tile * TILE;
        const size_t stride = tensor->nb[1];
        for (int i = 0; i < (end_tile - first_tile) * TILE; ++i)
            rows[i] = cells[i] == NO_CELL ? zero : start + size_t(cells[i]) * stride;
    }

    // The places of a tile whose cells a row sees.
    uint64_t seen_in_tile(int64_t row, int tile) const {
        const uint64_t *seen = plan_.seen(a_, block_.stream, row);
        const Tile &t = block_.tiles[size_t(tile)];
        uint64_t bits = t.all;
        for (uint64_t some = t.any & ~t.all; some != 0; some &= some - 1) {
            const int place = lowest_bit(some);
            const int32_t cell = block_.cells[size_t(tile * TILE + place)];
            bits |= (seen[cell / WORD] >> (cell % WORD) & 1) << place;
        }
        return bits;
    }

    void attend_tile(int tile) {
        const int n = int(n_rows_ * a_.group);
        std::fill_n(s_.scores, n * TILE, 0.0f);
        multiply(s_.scores, s_.queries, s_.keys, n, int(a_.n_embd_k), TILE);
        for (int64_t row = 0; row < n_rows_; ++row) {
            const uint64_t seen = seen_in_tile(block_.first_row + row, tile);
            for (int64_t i = row * a_.group; i < (row + 1) * a_.group; ++i)
                weigh(i, seen);
        }
        multiply(s_.chunk.values, s_.scores, s_.values, n, TILE, int(a_.n_embd_v));
    }

    // Turns the scores of a query into weights.
    void weigh(int64_t query, uint64_t seen) {
        float *scores = s_.scores + query * TILE;
        if (seen == 0) {
            std::fill_n(scores, TILE, 0.0f);
            return;
        }
        if (a_.soft_cap != 0.0f) {
            for (int i = 0; i < TILE; ++i)
                scores[i] = a_.soft_cap * std::tanh(scores[i]);
        }
        if (seen != ~uint64_t(0)) {
            for (int i = 0; i < TILE; ++i)
                if ((seen >> i & 1) == 0) scores[i] = -INFINITY;
        }
        float &highest = s_.chunk.highest[query];
        float of_tile = -INFINITY;
        ggml_vec_max_f32(TILE, &of_tile, scores);
        if (of_tile > highest) {
            const float factor = std::exp(highest - of_tile);
            ggml_vec_scale_f32(int(a_.n_embd_v), s_.chunk.values + query * a_.n_embd_v, factor);
            s_.chunk.weight[query] *= factor;
            highest = of_tile;
        }
        s_.chunk.weight[query] += float(ggml_vec_soft_max_f32(TILE, scores, scores, highest));
    }

    void store_partials(int chunk) const {
        for (int64_t i = 0; i < n_rows_ * a_.group; ++i) {
            const int64_t query = (block_.stream * a_.n_rows + row(i)) * a_.n_heads + head(i);
            float *partial = plan_.partials.data() + (query * plan_.n_chunks + chunk) * a_.partial_size();
            partial[0] = s_.chunk.highest[i];
            partial[1] = s_.chunk.weight[i];
            std::copy_n(s_.chunk.values + i * a_.n_embd_v, a_.n_embd_v, partial + 2);
        }
    }

    void store() const;

    void (*const load_keys_)(const char *const *, int, int, float *);
    void (*const load_values_)(const char *const *, int, int, float *);
    const Attention &a_;
    Plan &plan_;
    const Plan::Unit &unit_;
    const Block &block_;
    Scratch &s_;
    int64_t kv_head_, n_rows_;
};

void store_result(const Attention &a, int64_t stream, int64_t row, int64_t head, float highest, float weight,
                  const float *values) {
    auto *target = reinterpret_cast<float *>(static_cast<char *>(a.dst->data) +
                                             size_t((stream * a.n_rows + row) * a.n_heads + head) * a.dst->nb[1]);
    float factor = 1.0f;
    if (a.sinks != nullptr) { // one more score, whose value is zero
        const float sink = a.sinks[head], new_highest = std::max(highest, sink);
        factor = std::exp(highest - new_highest);
        weight = weight * factor + std::exp(sink - new_highest);
    }
    if (weight != 0.0f) factor /= weight;
    for (int64_t i = 0; i < a.n_embd_v; ++i)
        target[i] = values[i] * factor;
}

void Worker::store() const {
    for (int64_t i = 0; i < n_rows_ * a_.group; ++i)
        store_result(a_, block_.stream, row(i), head(i), s_.total.highest[i], s_.total.weight[i],
                     s_.total.values + i * a_.n_embd_v);
}

// Merges the chunks of this thread's share of the queries.
void merge_partials(const Attention &a, const Plan &plan, int ith, int nth) {
    static thread_local std::vector<float> values;
    values.resize(size_t(a.n_embd_v));
    for (size_t index = 0; index < plan.n_blocks(); ++index) {
        const Block &block = plan.block(index);
        if (block.tiles.empty()) continue;
        for (int64_t query = block.first_row * a.n_heads + ith; query < block.end_row * a.n_heads; query += nth) {
            float highest = -INFINITY, weight = 0.0f;
            std::fill(values.begin(), values.end(), 0.0f);
            const float *partial = plan.partials.data() +
                                   (block.stream * a.n_rows * a.n_heads + query) * plan.n_chunks * a.partial_size();
            for (int chunk = 0; chunk < block.n_chunks(); ++chunk, partial += a.partial_size())
                merge(highest, weight, values.data(), partial[0], partial[1], partial + 2, a.n_embd_v);
            store_result(a, block.stream, query / a.n_heads, query % a.n_heads, highest, weight, values.data());
        }
    }
}

} // namespace

extern "C" void ggml_compute_forward_flash_attn_ext(const ggml_compute_params *params, ggml_tensor *dst) {
    if (!is_usual(params, dst)) {
        ggml_flash_attn_ext_upstream(params, dst);
        return;
    }
    const Attention attention = describe(dst);
    if (params->ith == 0) {
        // The other threads find it in the work buffer, which all share.
        static thread_local Plans plans;
        Plan *address = &plans.find(attention, params->nth);
        std::memcpy(params->wdata, &address, sizeof address);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    Plan *plan;
    std::memcpy(&plan, params->wdata, sizeof plan);
    // The heads of a unit come one after the other: in each cell they are neighbours in memory.
    const int64_t n_units = int64_t(plan->units.size()) * attention.n_kv_heads;
    for (int64_t i = params->ith; i < n_units; i = ggml_threadpool_chunk_add(params->threadpool, 1))
        Worker(attention, *plan, plan->units[size_t(i / attention.n_kv_heads)], i % attention.n_kv_heads).run();
    if (plan->is_split) {
        ggml_barrier(params->threadpool);
        merge_partials(attention, *plan, params->ith, params->nth);
    }
}
