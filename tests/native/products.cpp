// Multiplies what test_products.py writes to the standard input, and writes the results to the standard output.
//
// A case is five numbers of 64 bits: the type, the numbers in a row, the rows of weights, the bytes of such a row, and
// the rows of activations. Then come the weights, and the activations as floats. The results are written twice: once
// all rows of activations were multiplied together, once each alone.

#include "matmul_product.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

// What ggml-impl.h and simd-mappings.h refer to.
extern "C" {
void ggml_abort(const char *, int, const char *, ...) { std::abort(); }
float ggml_table_f32_f16[1 << 16];
}

namespace {

template <class T> bool read(T *to, size_t n) { return std::fread(to, sizeof(T), n, stdin) == n; }

struct Free {
    void operator()(char *p) const { std::free(p); }
};

} // namespace

int main() {
    for (int i = 0; i < 1 << 16; ++i)
        ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32(ggml_fp16_t(i));
    int64_t numbers[5];
    while (read(numbers, 5)) {
        const auto [type, k, n, stride, n_rows] = numbers;
        std::vector<char> weights(size_t(n * stride));
        std::vector<float> x(size_t(n_rows * k));
        const Product *product = find_product(ggml_type(type));
        if (!read(weights.data(), weights.size()) || !read(x.data(), x.size()) || product == nullptr) return 1;
        Layout layout;
        layout.k = k;
        layout.is_wide = product->is_wide;
        layout.summed = product->summed;
        layout.is_flipped = product->is_flipped;
        const int64_t row_size = product->takes_floats ? (k * 4 + 63) / 64 * 64 : layout.size();
        const std::unique_ptr<char, Free> rows(static_cast<char *>(std::aligned_alloc(64, size_t(n_rows * row_size))));
        for (int64_t row = 0; row < n_rows; ++row) {
            char *to = rows.get() + row * row_size;
            if (product->takes_floats) std::memcpy(to, &x[size_t(row * k)], size_t(k) * sizeof(float));
            else round_row(layout, &x[size_t(row * k)], 0, k / GROUP, to);
        }
        for (const bool together : {true, false}) {
            std::vector<float> results(size_t(n_rows * TILE));
            std::vector<Row> all;
            for (int64_t row = 0; row < n_rows; ++row)
                all.push_back({rows.get() + row * row_size, &results[size_t(row * TILE)]});
            Weights tile{};
            tile.data = weights.data();
            tile.stride = size_t(stride);
            tile.n = int(n);
            tile.k = k;
            if (together) product->run(tile, layout, all.data(), n_rows);
            else
                for (const Row &row : all)
                    product->run(tile, layout, &row, 1);
            for (const Row &row : all)
                std::fwrite(row.results, sizeof(float), size_t(n), stdout);
        }
    }
}
