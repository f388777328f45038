// Attention on a CPU, in the place of ggml's own, for the usual case: keys and values of 16 bits, a mask, nothing else.
//
// ggml has one kernel for a single row, one for up to 63 of them, and one for more. The one in the middle, which is what
// several streams and a prompt beside them run on, converts every key and value anew for every row and head, and sums in
// 16 bits; at 1,800 cells a row takes it four times as long as the third kernel, and what it computes differs from the
// others in the third digit. This one is for any number of rows:
//
// - A tile of keys and values is converted once for all rows of a sequence and all heads of a group (GQA).
// - A tile has cells that these rows see, wherever they lie: cells of sequences that decode together alternate.
// - What a row gives depends on the cells it sees, to the last bit: not on the other rows, nor on other cells or the
//   number of threads. Cells are summed in chunks of fixed size, each by itself, and then chunk after chunk, whoever
//   computes them. (With a sliding window, chunks begin with the oldest cell that any row of the block sees.)
//
// Patches of an image all see each other, without a mask: that is left to ggml's third kernel, which is quicker then.
//
// The online softmax over tiles is that of FlashAttention (https://arxiv.org/abs/2205.14135), the merging of chunks that
// of Flash-Decoding.
//
// CMakeLists.txt compiles this into every variant of the CPU plugin and renames ggml's own function, which does
// everything else. TRIO_RUNNER_ATTENTION=ggml in the environment leaves all of it to that one.

#include "common.h"
#include "ggml-cpu-impl.h"
#include "ops.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" void ggml_flash_attn_ext_upstream(const ggml_compute_params *params, ggml_tensor *dst);

namespace {

constexpr int TILE = 64;         // cells that are converted at a time
constexpr int CHUNK = 4 * TILE;  // cells that are summed by themselves
constexpr int MAX_QUERIES = 64;  // rows times heads of a block
constexpr int UNITS_PER_THREAD = 4;
constexpr size_t MAX_PARTIALS = size_t(1) << 22; // floats: 16 MiB
constexpr uint16_t HIDDEN = 0xfc00;              // minus infinity in 16 bits; without a bias, the rest is zero

struct Attention {
    const ggml_tensor *q, *k, *v, *mask;
    ggml_tensor *dst;
    float scale;
    int64_t n_embd_k, n_embd_v, n_rows, n_heads, n_kv_heads, n_cells, n_streams;
    int64_t group; // heads that share keys and values

    int64_t partial_size() const { return 2 + n_embd_v; }
};

bool is_usual(const ggml_compute_params *params, const ggml_tensor *dst) {
    static const bool is_enabled = [] {
        const char *choice = std::getenv("TRIO_RUNNER_ATTENTION");
        return choice == nullptr || std::strcmp(choice, "ggml") != 0;
    }();
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    float max_bias, softcap;
    std::memcpy(&max_bias, dst->op_params + 1, sizeof max_bias);
    std::memcpy(&softcap, dst->op_params + 2, sizeof softcap);
    return is_enabled && !params->use_ref && sinks == nullptr && max_bias == 0.0f && softcap == 0.0f &&
           q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
           q->nb[0] == sizeof(float) && k->nb[0] == sizeof(ggml_fp16_t) && v->nb[0] == sizeof(ggml_fp16_t) &&
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
    std::memcpy(&a.scale, dst->op_params, sizeof a.scale);
    a.n_embd_k = a.k->ne[0];
    a.n_embd_v = a.v->ne[0];
    a.n_rows = a.q->ne[1];
    a.n_heads = a.q->ne[2];
    a.n_streams = a.q->ne[3];
    a.n_cells = a.k->ne[1];
    a.n_kv_heads = a.k->ne[2];
    a.group = a.n_heads / a.n_kv_heads;
    return a;
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

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

void convert(const ggml_fp16_t *source, float *target, int n) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(source + i))));
#endif
    if (i < n) ggml_cpu_fp16_to_fp32(source + i, target + i, n - i);
}

#if defined(__AVX__) && defined(__F16C__)
// Eight rows of eight become eight columns.
void transpose_8x8(const char *const *rows, size_t offset, float *target) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i)
        r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + offset)));
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

// Asks for cells that will be needed, but not before what is at hand: rows so far apart are not foreseen by the hardware.
void prefetch(const char *const *rows, int n_cells, int n_embd) {
#if defined(__GNUC__)
    for (int cell = 0; cell < n_cells; ++cell) {
        for (size_t i = 0; i < size_t(n_embd) * sizeof(ggml_fp16_t); i += CACHE_LINE_SIZE)
            __builtin_prefetch(rows[cell] + i, 0, 2);
    }
#endif
}

// Keys lie in columns, as many of them as TILE; those that are not there are zero.
void load_keys(const char *const *rows, int n_cells, int n_embd, float *keys) {
    int cell = 0;
#if defined(__AVX__) && defined(__F16C__)
    if (n_embd % 8 == 0) {
        for (; cell + 8 <= n_cells; cell += 8) {
            for (int i = 0; i < n_embd; i += 8)
                transpose_8x8(rows + cell, size_t(i) * sizeof(ggml_fp16_t), keys + i * TILE + cell);
        }
    }
#endif
    for (; cell < n_cells; ++cell) {
        const auto *key = reinterpret_cast<const ggml_fp16_t *>(rows[cell]);
        for (int i = 0; i < n_embd; ++i)
            keys[i * TILE + cell] = GGML_CPU_FP16_TO_FP32(key[i]);
    }
    for (; cell < TILE; ++cell) {
        for (int i = 0; i < n_embd; ++i)
            keys[i * TILE + cell] = 0.0f;
    }
}

void load_values(const char *const *rows, int n_cells, int n_embd, float *values) {
    for (int cell = 0; cell < n_cells; ++cell)
        convert(reinterpret_cast<const ggml_fp16_t *>(rows[cell]), values + cell * n_embd, n_embd);
    std::fill_n(values + n_cells * n_embd, (TILE - n_cells) * n_embd, 0.0f);
}

// ---- who sees what -------------------------------------------------------------------------------------------------

constexpr int WORD = 64;

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

// Some rows of one sequence, as far as can be seen, and all cells that any of them sees.
struct Block {
    int64_t stream, first_row, end_row;
    std::vector<int32_t> cells;

    int n_chunks() const { return int((cells.size() + CHUNK - 1) / CHUNK); }
};

// Who attends to what, and how that is divided among threads. Made by one of them, once for each operation.
class Plan {
public:
    void make(const Attention &attention, int n_threads) {
        const Attention &a = attention;
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
    std::vector<Unit> units; // each for every head of keys
    int64_t n_chunks;        // of the block that has most
    bool is_split;           // a unit is a chunk, and leaves its sums in `partials`
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

    // From `row` on, as long as each row sees what the one before it saw, except what lies before all that it sees.
    // Returns the row after it.
    int64_t add_block(const Attention &a, int64_t stream, int64_t row) {
        if (blocks_.size() == n_blocks_) blocks_.emplace_back();
        Block &block = blocks_[n_blocks_++];
        const int64_t end = std::min(a.n_rows, row + std::max(MAX_QUERIES / a.group, int64_t(1)));
        block.stream = stream;
        block.first_row = row;
        any_.assign(seen(a, stream, row), seen(a, stream, row) + n_words_);
        for (++row; row < end && goes_on(seen(a, stream, row - 1), seen(a, stream, row)); ++row) {
            const uint64_t *more = seen(a, stream, row);
            for (size_t i = 0; i < n_words_; ++i)
                any_[i] |= more[i];
        }
        block.end_row = row;
        block.cells.clear();
        for (size_t i = 0; i < n_words_; ++i) {
            for (uint64_t word = any_[i]; word != 0; word &= word - 1)
                block.cells.push_back(int32_t(i) * WORD + lowest_bit(word));
        }
        return row;
    }

    bool goes_on(const uint64_t *before, const uint64_t *seen) const {
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

    size_t n_words_, n_blocks_;
    std::vector<uint64_t> seen_, any_; // sets of cells, a bit for each
    std::vector<Block> blocks_;        // more than there are: their memory is used again
};

// ---- one block of rows ---------------------------------------------------------------------------------------------

// What cells gave so far: per query the highest score, the sum of weights, and the weighted sum of values.
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

// Adds the sums of one query over one more chunk. Everybody does it in the order of the chunks.
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
        : a_(attention), plan_(plan), unit_(unit), block_(plan.block(unit.block)), s_(scratch(attention)),
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
        store(); // also where there was nothing to see
    }

private:
    struct Scratch {
        std::vector<float> floats;
        float *keys, *values, *queries, *scores;
        Sums chunk, total;
    };

    // Of this thread, and of the size that is needed.
    static Scratch &scratch(const Attention &a) {
        static thread_local Scratch s;
        const size_t n_tile = size_t(TILE) * size_t(a.n_embd_k + a.n_embd_v);
        const size_t n_query = size_t(MAX_QUERIES) * size_t(a.n_embd_k + 2 * a.n_embd_v + TILE);
        if (s.floats.size() < n_tile + n_query) s.floats.resize(n_tile + n_query);
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

    // In the order of rows, and of heads within them.
    void load_queries() {
        for (int64_t i = 0; i < n_rows_ * a_.group; ++i) {
            const auto *q = reinterpret_cast<const float *>(static_cast<const char *>(a_.q->data) +
                                                            size_t(row(i)) * a_.q->nb[1] + size_t(head(i)) * a_.q->nb[2] +
                                                            size_t(block_.stream) * a_.q->nb[3]);
            for (int64_t j = 0; j < a_.n_embd_k; ++j)
                s_.queries[i * a_.n_embd_k + j] = q[j] * a_.scale;
        }
    }

    void attend(int chunk) {
        const int32_t *cells = block_.cells.data() + chunk * CHUNK;
        const int n_cells = int(std::min(size_t(CHUNK), block_.cells.size() - size_t(chunk) * CHUNK));
        const char *keys[CHUNK], *values[CHUNK];
        for (int i = 0; i < n_cells; ++i) {
            keys[i] = at(a_.k, cells[i]);
            values[i] = at(a_.v, cells[i]);
        }
        for (int cell = 0; cell < n_cells; cell += TILE) {
            const int n = std::min(TILE, n_cells - cell), next = cell + n;
            prefetch(keys + next, std::min(TILE, n_cells - next), int(a_.n_embd_k));
            prefetch(values + next, std::min(TILE, n_cells - next), int(a_.n_embd_v));
            load_keys(keys + cell, n, int(a_.n_embd_k), s_.keys);
            load_values(values + cell, n, int(a_.n_embd_v), s_.values);
            attend_tile(cells + cell, n);
        }
    }

    const char *at(const ggml_tensor *tensor, int32_t cell) const {
        return static_cast<const char *>(tensor->data) + size_t(cell) * tensor->nb[1] +
               size_t(kv_head_) * tensor->nb[2] + size_t(kv_stream()) * tensor->nb[3];
    }

    // Which of the tile's cells a row sees.
    uint64_t seen_in_tile(int64_t row, const int32_t *cells, int n_cells) const {
        const uint64_t *seen = plan_.seen(a_, block_.stream, row);
        uint64_t bits = 0;
        for (int i = 0; i < n_cells; ++i)
            bits |= (seen[cells[i] / WORD] >> (cells[i] % WORD) & 1) << i;
        return bits;
    }

    void attend_tile(const int32_t *cells, int n_cells) {
        const int n = int(n_rows_ * a_.group);
        std::fill_n(s_.scores, n * TILE, 0.0f);
        multiply(s_.scores, s_.queries, s_.keys, n, int(a_.n_embd_k), TILE);
        for (int64_t row = 0; row < n_rows_; ++row) {
            const uint64_t seen = n_rows_ == 1 ? ~uint64_t(0) >> (TILE - n_cells)
                                               : seen_in_tile(block_.first_row + row, cells, n_cells);
            for (int64_t i = row * a_.group; i < (row + 1) * a_.group; ++i)
                weigh(i, seen);
        }
        multiply(s_.chunk.values, s_.scores, s_.values, n, TILE, int(a_.n_embd_v));
    }

    // The scores of a query become weights.
    void weigh(int64_t query, uint64_t seen) {
        float *scores = s_.scores + query * TILE;
        if (seen == 0) {
            std::fill_n(scores, TILE, 0.0f);
            return;
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

    const Attention &a_;
    Plan &plan_;
    const Plan::Unit &unit_;
    const Block &block_;
    Scratch &s_;
    int64_t kv_head_, n_rows_;
};

void store_result(const Attention &a, int64_t stream, int64_t row, int64_t head, float weight, const float *values) {
    auto *target = reinterpret_cast<float *>(static_cast<char *>(a.dst->data) +
                                             size_t((stream * a.n_rows + row) * a.n_heads + head) * a.dst->nb[1]);
    const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
    for (int64_t i = 0; i < a.n_embd_v; ++i)
        target[i] = values[i] * inverse;
}

void Worker::store() const {
    for (int64_t i = 0; i < n_rows_ * a_.group; ++i)
        store_result(a_, block_.stream, row(i), head(i), s_.total.weight[i], s_.total.values + i * a_.n_embd_v);
}

// Of the queries that fall to this thread.
void merge_partials(const Attention &a, const Plan &plan, int ith, int nth) {
    static thread_local std::vector<float> values;
    values.resize(size_t(a.n_embd_v));
    for (size_t index = 0; index < plan.n_blocks(); ++index) {
        const Block &block = plan.block(index);
        if (block.cells.empty()) continue;
        for (int64_t query = block.first_row * a.n_heads + ith; query < block.end_row * a.n_heads; query += nth) {
            float highest = -INFINITY, weight = 0.0f;
            std::fill(values.begin(), values.end(), 0.0f);
            const float *partial = plan.partials.data() +
                                   (block.stream * a.n_rows * a.n_heads + query) * plan.n_chunks * a.partial_size();
            for (int chunk = 0; chunk < block.n_chunks(); ++chunk, partial += a.partial_size())
                merge(highest, weight, values.data(), partial[0], partial[1], partial + 2, a.n_embd_v);
            store_result(a, block.stream, query / a.n_heads, query % a.n_heads, weight, values.data());
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
        // The others find it in the work buffer, which all threads share.
        static thread_local Plan made;
        made.make(attention, params->nth);
        Plan *address = &made;
        std::memcpy(params->wdata, &address, sizeof address);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    Plan *plan;
    std::memcpy(&plan, params->wdata, sizeof plan);
    // Heads of the same cells are neighbours in memory.
    const int64_t n_units = int64_t(plan->units.size()) * attention.n_kv_heads;
    for (int64_t i = params->ith; i < n_units; i = ggml_threadpool_chunk_add(params->threadpool, 1))
        Worker(attention, *plan, plan->units[size_t(i / attention.n_kv_heads)], i % attention.n_kv_heads).run();
    if (plan->is_split) {
        ggml_barrier(params->threadpool);
        merge_partials(attention, *plan, params->ith, params->nth);
    }
}
