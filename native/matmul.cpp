// Products of weights with rows of activations on a CPU, in the place of ggml's own: MUL_MAT and MUL_MAT_ID.
//
// ggml has several kernels for a product: for one row and for many, for repacked weights, for tiles. Which one runs
// depends on how many rows there are, and each sums in another order, so what a row gives depends on its neighbours.
// Here there is one (matmul_product.h), and what a row gives depends, to the last bit, on this row and the weights alone.
// It is also quicker, as a tile of weights is unpacked once for all rows. Weights stay as and where they are in the file.
//
// ggml asks "extra buffer types" first who computes an operation. They are meant for weights in a layout of their own,
// but may claim any operation, with a work buffer of their own size. So nothing needs to be patched in ggml's dispatch:
// patches/matmul.cmake puts ours in front of the others. No tensor is ever allocated in it.
//
// Types without an unpacker of ours are left to ggml's dot product of one row (vec_dot), one row at a time.
// TRIO_RUNNER_MATMUL=ggml in the environment leaves everything to ggml.

#include "matmul_product.h"

#include "common.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "traits.h"

#include <cstdlib>
#include <vector>

extern "C" bool ggml_cpu_is_abort_wanted(ggml_threadpool *threadpool);
std::vector<ggml_backend_buffer_type_t> &ggml_cpu_operation_owners();

namespace {

constexpr int64_t MOST_ROWS = 512;      // of activations that are multiplied with a tile before the next one
constexpr int64_t ROWS_CACHE = 1 << 18; // their bytes at most: what the second cache holds beside other things
constexpr int64_t FEWEST_ROWS = 16;     // below which it is not worth unpacking a tile twice
constexpr int64_t UNITS_PER_THREAD = 8; // so that a slow core does not hold up the others
constexpr int64_t UNIT_WORK = 1 << 28;  // multiplications of a unit at most: some milliseconds
constexpr int64_t ABORT_WORK = 1 << 24; // multiplications of a node from which it is looked whether it is aborted

bool is_enabled() {
    static const bool answer = [] {
        const char *choice = std::getenv("TRIO_RUNNER_MATMUL");
        return choice == nullptr || std::strcmp(choice, "ggml") != 0;
    }();
    return answer;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One operation: its operands, and how its work is divided.
class MatMul {
public:
    explicit MatMul(ggml_tensor *op)
        : weights_(op->src[0]), x_(op->src[1]), ids_(op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : nullptr), results_(op),
          product_(find_product(weights_->type)), k_(weights_->ne[0]), n_rows_(x_->ne[1] * x_->ne[2] * x_->ne[3]),
          n_tiles_((weights_->ne[1] + TILE - 1) / TILE) {
        layout_.k = k_;
        // Where both operands are computed, k may count rows of the batch (pooling does so). Then nothing may depend on
        // where among these a sequence begins, such as borders between chains.
        layout_.is_whole = weights_->op != GGML_OP_NONE;
        if (product_ != nullptr) {
            layout_.is_wide = product_->is_wide;
            layout_.summed = product_->summed;
            layout_.is_flipped = product_->is_flipped;
        }
    }

    size_t work_size() const { return size_t(n_rows_ * row_size()) + assignment_size() + 64; }

    // False if it was aborted: then the results are garbage.
    void compute(const ggml_compute_params *params) {
        auto *work = static_cast<char *>(params->wdata);
        rounded_ = work + (64 - reinterpret_cast<uintptr_t>(work) % 64) % 64;
        round_rows(params->ith, params->nth);
        if (params->ith == 0) {
            if (ids_ != nullptr) assign_rows();
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        const bool may_abort = double(k_) * double(weights_->ne[1]) * double(ggml_nrows(results_)) > double(ABORT_WORK);
        int64_t unit = params->ith, first = 0;
        const int64_t n_used = n_used_matrices();
        for (int64_t matrix = 0; matrix < n_matrices(); ++matrix) {
            if (n_rows_of(matrix) == 0) continue;
            const Division division(n_tiles_, n_rows_of(matrix), row_bytes(), TILE * k_, n_used, params->nth);
            for (; unit < first + division.n_units(); unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
                if (may_abort && ggml_cpu_is_abort_wanted(params->threadpool)) return;
                multiply_unit(matrix, division, unit - first, params->nth);
            }
            first += division.n_units();
        }
    }

private:
    // How the product with one matrix is divided into units: some tiles times some rows.
    struct Division {
        int64_t n_tiles, n_rows, tiles_at_once, rows_at_once;

        Division(int64_t tiles, int64_t rows, int64_t row_bytes, int64_t tile_work, int64_t n_matrices, int n_threads)
            : n_tiles(tiles), n_rows(rows) {
            const int64_t wanted = (n_threads == 1 ? 1 : n_threads * UNITS_PER_THREAD) / n_matrices + 1,
                          most = std::max(FEWEST_ROWS, std::min(MOST_ROWS, ROWS_CACHE / row_bytes)),
                          parts = std::max(divide_up(n_rows, most), std::min(wanted / n_tiles, n_rows / FEWEST_ROWS));
            rows_at_once = std::max<int64_t>(1, divide_up(n_rows, std::max<int64_t>(1, parts)));
            tiles_at_once = std::max<int64_t>(1, std::min(n_tiles / wanted, UNIT_WORK / (tile_work * rows_at_once)));
        }
        int64_t n_tile_parts() const { return divide_up(n_tiles, tiles_at_once); }
        int64_t n_row_parts() const { return divide_up(n_rows, rows_at_once); }
        int64_t n_units() const { return n_tile_parts() * n_row_parts(); }
    };

    int64_t n_matrices() const { return ids_ != nullptr ? weights_->ne[2] : x_->ne[2] * x_->ne[3]; }
    int64_t n_rows_of(int64_t matrix) const { return ids_ != nullptr ? counts()[matrix] : x_->ne[1]; }
    // A few rows use few of many experts.
    int64_t n_used_matrices() const {
        const int64_t n = n_matrices();
        return ids_ != nullptr ? n - std::count(counts(), counts() + n, 0) : n;
    }

    ggml_type dot_type() const { return ggml_get_type_traits_cpu(weights_->type)->vec_dot_type; }
    int64_t row_size() const { // of a rounded row
        if (product_ == nullptr) return int64_t(ggml_row_size(dot_type(), k_) + 63) / 64 * 64;
        return product_->takes_floats ? 0 : layout_.size();
    }
    int64_t row_bytes() const { return row_size() == 0 ? k_ * int64_t(sizeof(float)) : row_size(); }
    const char *x_row(int64_t row) const {
        const int64_t i1 = row % x_->ne[1], i2 = row / x_->ne[1] % x_->ne[2], i3 = row / x_->ne[1] / x_->ne[2];
        return static_cast<const char *>(x_->data) + size_t(i1) * x_->nb[1] + size_t(i2) * x_->nb[2] +
               size_t(i3) * x_->nb[3];
    }
    const char *activations(int64_t row) const { return row_size() == 0 ? x_row(row) : rounded_ + row * row_size(); }

    // This thread's share of the rows, or where there are few, of their groups.
    void round_rows(int ith, int nth) const {
        if (row_size() == 0) return;
        if (product_ == nullptr) {
            const auto from_float = ggml_get_type_traits_cpu(dot_type())->from_float;
            for (int64_t row = ith; row < n_rows_; row += nth) {
                const auto *x = reinterpret_cast<const float *>(x_row(row));
                if (from_float == nullptr) std::memcpy(rounded_ + row * row_size(), x, size_t(k_) * sizeof(float));
                else from_float(x, rounded_ + row * row_size(), k_);
            }
            return;
        }
        const int64_t n_groups = k_ / GROUP, n = n_rows_ * n_groups;
        for (int64_t i = n * ith / nth, end = n * (ith + 1) / nth; i < end;) {
            const int64_t row = i / n_groups, begin = i % n_groups, last = std::min(n_groups, begin + end - i);
            round_row(layout_, reinterpret_cast<const float *>(x_row(row)), begin, last, rounded_ + row * row_size());
            i += last - begin;
        }
    }

    // With ids: which rows go to which expert. In the work buffer: a count for each expert, then for each its rows'
    // places in ids, in their order.
    size_t assignment_size() const {
        return ids_ == nullptr ? 0 : size_t(2 * weights_->ne[2] + ids_->ne[0] * ids_->ne[1]) * sizeof(int32_t);
    }
    int32_t *counts() const { return reinterpret_cast<int32_t *>(rounded_ + n_rows_ * row_size()); }
    int32_t *begins() const { return counts() + weights_->ne[2]; }
    int32_t *places() const { return begins() + weights_->ne[2]; }
    int32_t expert(int64_t place) const {
        const int64_t i0 = place % ids_->ne[0], i1 = place / ids_->ne[0];
        return *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids_->data) + size_t(i0) * ids_->nb[0] +
                                                  size_t(i1) * ids_->nb[1]);
    }
    void assign_rows() const {
        const int64_t n_experts = weights_->ne[2], n_places = ids_->ne[0] * ids_->ne[1];
        std::fill_n(counts(), n_experts, 0);
        for (int64_t place = 0; place < n_places; ++place) {
            GGML_ASSERT(expert(place) >= 0 && expert(place) < n_experts);
            ++counts()[expert(place)];
        }
        for (int64_t i = 0, begin = 0; i < n_experts; begin += counts()[i], ++i)
            begins()[i] = int32_t(begin);
        for (int64_t place = 0; place < n_places; ++place)
            places()[begins()[expert(place)]++] = int32_t(place);
        for (int64_t i = 0; i < n_experts; ++i)
            begins()[i] -= counts()[i];
    }

    // The row number `i` of those that are multiplied with a matrix. Its results begin with the matrix's first row.
    Row row_of(int64_t matrix, int64_t i) const {
        auto *results = static_cast<char *>(results_->data);
        if (ids_ == nullptr) {
            const int64_t i2 = matrix % x_->ne[2], i3 = matrix / x_->ne[2];
            results += size_t(i) * results_->nb[1] + size_t(i2) * results_->nb[2] + size_t(i3) * results_->nb[3];
            return {activations(matrix * x_->ne[1] + i), reinterpret_cast<float *>(results)};
        }
        const int64_t place = places()[begins()[matrix] + i], slot = place % ids_->ne[0], token = place / ids_->ne[0];
        results += size_t(slot) * results_->nb[1] + size_t(token) * results_->nb[2];
        return {activations(token * x_->ne[1] + slot % x_->ne[1]), reinterpret_cast<float *>(results)};
    }

    const char *matrix_data(int64_t matrix) const {
        const auto *data = static_cast<const char *>(weights_->data);
        if (ids_ != nullptr) return data + size_t(matrix) * weights_->nb[2];
        const int64_t i2 = matrix % x_->ne[2], i3 = matrix / x_->ne[2];
        return data + size_t(i2 / (x_->ne[2] / weights_->ne[2])) * weights_->nb[2] +
               size_t(i3 / (x_->ne[3] / weights_->ne[3])) * weights_->nb[3];
    }

    const char *tile_data(int64_t matrix, int64_t tile) const {
        return matrix_data(matrix) + size_t(tile * TILE) * weights_->nb[1];
    }

    void multiply_unit(int64_t matrix, const Division &division, int64_t unit, int n_threads) const {
        const int64_t first_tile = unit % division.n_tile_parts() * division.tiles_at_once,
                      // of the unit that this thread will probably take next
                      later_tile = first_tile + division.tiles_at_once * n_threads,
                      end_tile = std::min(first_tile + division.tiles_at_once, n_tiles_),
                      first_row = unit / division.n_tile_parts() * division.rows_at_once,
                      n_rows = std::min(division.rows_at_once, division.n_rows - first_row);
        Row all[MOST_ROWS], rows[MOST_ROWS];
        for (int64_t i = 0; i < n_rows; ++i)
            all[i] = row_of(matrix, first_row + i);
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            const int64_t first = tile * TILE, n = std::min<int64_t>(TILE, weights_->ne[1] - first),
                          next = tile + 1 < end_tile ? tile + 1 : later_tile;
            // The last tile, which may not be full, is not worth fetching, nor is what lies between rows of a view.
            const bool is_fetched = next + 1 < n_tiles_ && weights_->nb[1] == ggml_row_size(weights_->type, k_);
            const Weights weights{tile_data(matrix, tile), weights_->nb[1], int(n), k_,
                                  is_fetched ? tile_data(matrix, next) : nullptr};
            if (product_ == nullptr) {
                multiply_dots(weights, all, n_rows, first);
                continue;
            }
            // A tile that is not full has results beside those that are wanted.
            static thread_local std::vector<float> full;
            if (n < TILE) full.resize(MOST_ROWS * TILE);
            for (int64_t i = 0; i < n_rows; ++i)
                rows[i] = {all[i].activations, n < TILE ? full.data() + i * TILE : all[i].results + first};
            product_->run(weights, layout_, rows, n_rows);
            for (int64_t i = 0; i < n_rows && n < TILE; ++i)
                std::copy_n(rows[i].results, n, all[i].results + first);
        }
    }

    void multiply_dots(const Weights &weights, const Row *rows, int64_t n_rows, int64_t first) const {
        const auto dot = ggml_get_type_traits_cpu(weights_->type)->vec_dot;
        for (int64_t i = 0; i < n_rows; ++i)
            for (int64_t j = 0; j < weights.n; ++j)
                dot(int(k_), rows[i].results + first + j, 0, weights.data + size_t(j) * weights.stride, 0,
                    rows[i].activations, 0, 1);
    }

    const ggml_tensor *weights_, *x_, *ids_;
    ggml_tensor *results_;
    const Product *product_;
    int64_t k_, n_rows_, n_tiles_;
    Layout layout_;
    char *rounded_ = nullptr;
};

// Whether the operation is one that is computed here.
bool is_ours(const ggml_tensor *op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) return false;
    const ggml_tensor *weights = op->src[0], *x = op->src[1];
    if (op->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(op, 1) == GGML_HINT_SRC0_IS_HADAMARD) return false;
    const ggml_backend_buffer_t buffer = weights->view_src ? weights->view_src->buffer : weights->buffer;
    if (buffer != nullptr && !ggml_backend_buffer_is_host(buffer)) return false; // weights in another layout
    return x->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float) &&
           x->nb[0] == sizeof(float) && weights->nb[0] == ggml_type_size(weights->type) && x->ne[0] > 0 &&
           (find_product(weights->type) != nullptr || ggml_get_type_traits_cpu(weights->type)->vec_dot != nullptr);
}

class Traits : public ggml::cpu::tensor_traits {
public:
    bool work_size(int, const ggml_tensor *op, size_t &size) override {
        size = MatMul(const_cast<ggml_tensor *>(op)).work_size();
        return true;
    }
    // Also if ggml's reference is wanted (use_ref): for that, no work buffer was planned.
    bool compute_forward(ggml_compute_params *params, ggml_tensor *op) override {
        MatMul(op).compute(params);
        return true;
    }
};

class BufferType : public ggml::cpu::extra_buffer_type {
public:
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; } // for weights allocated in it
    ggml::cpu::tensor_traits *get_tensor_traits(const ggml_tensor *op) override {
        static Traits traits;
        return is_ours(op) ? &traits : nullptr;
    }
};

} // namespace

// Who is asked for an operation before ggml's own code. traits.cpp calls this instead of upstream's list.
std::vector<ggml_backend_buffer_type_t> &ggml_cpu_operation_owners() {
    static std::vector<ggml_backend_buffer_type_t> owners = [] {
        static BufferType ours;
        static ggml_backend_buffer_type type = *ggml_backend_cpu_buffer_type();
        type.context = &ours;
        std::vector<ggml_backend_buffer_type_t> all = ggml_backend_cpu_get_extra_buffer_types();
        if (is_enabled()) all.insert(all.begin(), &type);
        return all;
    }();
    return owners;
}
