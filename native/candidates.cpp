// Passes over the logits of a whole vocabulary: penalties, the best candidates, and the check for what are not numbers.

#include "sampler.h"

#include <algorithm>

using namespace trio;

namespace {

constexpr int32_t BLOCK = 64; // logits that are compared at once

// The answer is an integer, and the loop has no early end: so compilers use vector instructions, here and in
// are_numbers(), which is four times as fast.
bool any_above(const float *block, float bar) {
    int32_t found = 0;
    for (int32_t i = 0; i < BLOCK; ++i)
        found |= block[i] > bar;
    return found != 0;
}

} // namespace

// Negative infinity is a mask; anything else not finite is a failure of the model.
bool trio::are_numbers(const float *logits, int32_t n_vocab) {
    int32_t bad = 0;
    for (int32_t token = 0; token < n_vocab; ++token)
        bad |= !(logits[token] < std::numeric_limits<float>::infinity());
    return bad == 0;
}

void Penalties::accept(int32_t token) {
    if (!enabled()) return;
    if (ring_.size() < size_t(window_)) {
        ring_.push_back(token);
    } else {
        const auto leaving = counts_.find(ring_[oldest_]);
        if (--leaving->second == 0) counts_.erase(leaving);
        ring_[oldest_] = token;
        oldest_ = (oldest_ + 1) % ring_.size();
    }
    ++counts_[token];
}

void Penalties::apply(float *logits) const {
    if (!enabled()) return;
    for (const auto &[token, count] : counts_) {
        if (token == exempt_token_) continue;
        float &logit = logits[token];
        // Dividing a negative logit would reward the token.
        logit = logit <= 0.0f ? logit * repeat_ : logit / repeat_;
        logit -= float(count) * frequency_ + presence_;
    }
}

size_t trio::select_top(const float *logits, int32_t n_vocab, int32_t k, llama_token_data *best) {
    const auto precedes = [](const llama_token_data &a, const llama_token_data &b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    // A heap of the best so far, with the worst of them at its root. Tokens come in ascending order, so one whose logit
    // only equals the root's does not replace it.
    size_t size = 0;
    float bar = NEVER;
    for (int32_t begin = 0; begin < n_vocab; begin += BLOCK) {
        const int32_t end = std::min(begin + BLOCK, n_vocab);
        if (end - begin == BLOCK && !any_above(logits + begin, bar)) continue;
        for (int32_t token = begin; token < end; ++token) {
            if (!(logits[token] > bar)) continue;
            if (size == size_t(k)) std::pop_heap(best, best + size--, precedes);
            best[size++] = {token, logits[token], 0.0f};
            std::push_heap(best, best + size, precedes);
            if (size == size_t(k)) bar = best[0].logit;
        }
    }
    std::sort_heap(best, best + size, precedes);
    return size;
}
