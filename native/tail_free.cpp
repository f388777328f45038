// Tail-free sampling: removed from llama.cpp, still in the original runner's protocol.
//
// Sorted by probability, the curve of the candidates bends where the tail begins. The absolute second derivative is
// normalised to sum 1; candidates are kept until it has accumulated to z.
// (https://www.trentonbricken.com/Tail-Free-Sampling)

#include "sampler.h"

#include <algorithm>
#include <cmath>

using namespace trio;

namespace {

struct TailFree {
    float z;
    std::vector<float> bend; // scratch
};

void tail_free_apply(llama_sampler *sampler, llama_token_data_array *array) {
    auto *self = static_cast<TailFree *>(sampler->ctx);
    if (self->z >= 1.0f || array->size <= 2) return;
    if (!array->sorted) {
        std::sort(array->data, array->data + array->size,
                  [](const llama_token_data &a, const llama_token_data &b) { return a.logit > b.logit; });
        array->sorted = true;
    }
    double sum = 0.0;
    for (size_t i = 0; i < array->size; ++i) {
        array->data[i].p = std::exp(array->data[i].logit - array->data[0].logit);
        sum += array->data[i].p;
    }
    for (size_t i = 0; i < array->size; ++i)
        array->data[i].p = float(array->data[i].p / sum);

    std::vector<float> &bend = self->bend;
    bend.resize(array->size - 2);
    double total = 0.0;
    for (size_t i = 0; i < bend.size(); ++i) {
        const float slope = array->data[i].p - array->data[i + 1].p;
        const float next_slope = array->data[i + 1].p - array->data[i + 2].p;
        bend[i] = std::fabs(slope - next_slope);
        total += bend[i];
    }
    if (!(total > 0.0)) return; // a straight line has no tail
    double accumulated = 0.0;
    for (size_t i = 0; i < bend.size(); ++i) {
        accumulated += bend[i] / total;
        if (accumulated > self->z && i >= MIN_KEEP) {
            array->size = i;
            return;
        }
    }
}

} // namespace

llama_sampler *trio::tail_free_init(float z) {
    static llama_sampler_i interface = [] {
        llama_sampler_i methods{};
        methods.name = [](const llama_sampler *) { return "tail-free"; };
        methods.apply = tail_free_apply;
        methods.free = [](llama_sampler *sampler) { delete static_cast<TailFree *>(sampler->ctx); };
        return methods;
    }();
    return llama_sampler_init(&interface, new TailFree{z, {}});
}
