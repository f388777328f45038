// Samplers: from one row of logits to one token.
//
// The order is the original runner's: biases, penalties, DRY; then the truncating samplers; then temperature and the
// draw. A grammar is asked last: the token is chosen without it, checked against it alone, and only if it is refused
// are all candidates checked and the choice made anew. That keeps a grammar's cost near zero while the model obeys it
// by itself.

#include "trio_internal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

using namespace trio;

namespace {

constexpr int32_t MAX_WINDOW = 1 << 20;  // DRY allocates its window at once
constexpr float MIN_TEMPERATURE = 1e-6f; // keeps logit / temperature finite
constexpr size_t MIN_KEEP = 1;
constexpr int32_t MIROSTAT_M = 100; // the paper's value

// An ambiguous grammar grows with every token and cannot be interrupted, so it is stopped while its steps still end.
// Checking a whole large vocabulary honestly costs something like a microsecond per entry.
constexpr double GRAMMAR_SECONDS = 0.05;
constexpr double GRAMMAR_SECONDS_PER_TOKEN_OF_VOCABULARY = 1e-6;
constexpr double GRAMMAR_HARD_FACTOR = 5.0;
constexpr int32_t MAX_SLOW_GRAMMAR_STEPS = 3;

// So many candidates are checked between two looks at the clock: twice as many after a quick slice, half after a slow
// one. Each slice walks through the grammar anew, so that one slice for all would be the cheapest.
constexpr size_t FIRST_GRAMMAR_SLICE = 64;
constexpr size_t MIN_GRAMMAR_SLICE = 8;
constexpr double QUICK_GRAMMAR_SLICE = 0.01; // seconds
constexpr double SLOW_GRAMMAR_SLICE = 0.05;

constexpr float NEVER = -std::numeric_limits<float>::infinity();

constexpr int32_t MAX_HEAD = 1024; // with some thousands, llama.cpp's sort into buckets is faster than a heap
constexpr int32_t BLOCK = 64;     // logits that are compared at once

// An integer for the answer, and no early end, let compilers take vector instructions: here and below, four times as
// fast.
bool any_above(const float *block, float bar) {
    int32_t found = 0;
    for (int32_t i = 0; i < BLOCK; ++i)
        found |= block[i] > bar;
    return found != 0;
}

// Negative infinity is a mask; anything else not finite is a failure of the model.
bool are_numbers(const float *logits, int32_t n_vocab) {
    int32_t rubbish = 0;
    for (int32_t token = 0; token < n_vocab; ++token)
        rubbish |= !(logits[token] < std::numeric_limits<float>::infinity());
    return rubbish == 0;
}

bool is_finite_in_range(float value, float low, float high) {
    return std::isfinite(value) && value >= low && value <= high;
}

// Every candidate is judged for itself, so this does what one call for all does, unless it takes longer than `limit`:
// then it stops. Adds the seconds to `spent`.
void apply_in_slices(llama_sampler *grammar, llama_token_data_array &array, double limit, double &spent) {
    size_t slice = FIRST_GRAMMAR_SLICE;
    for (size_t begin = 0; begin < array.size && spent <= limit;) {
        llama_token_data_array part{array.data + begin, std::min(slice, array.size - begin), -1, false};
        const double started = thread_seconds();
        llama_sampler_apply(grammar, &part);
        const double seconds = thread_seconds() - started;
        spent += seconds;
        begin += part.size;
        if (seconds < QUICK_GRAMMAR_SLICE) slice *= 2;
        if (seconds > SLOW_GRAMMAR_SLICE) slice = std::max(slice / 2, MIN_GRAMMAR_SLICE);
    }
}

// ---- tail-free sampling --------------------------------------------------------------------------------------------
// Removed from llama.cpp, still in the original runner's protocol. Sorted by probability, the curve of the candidates
// bends where the tail begins: keep them until the absolute second derivative, normalised to sum 1, has accumulated to
// z.

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

llama_sampler *tail_free_init(float z) {
    static llama_sampler_i interface = [] {
        llama_sampler_i methods{};
        methods.name = [](const llama_sampler *) { return "tail-free"; };
        methods.apply = tail_free_apply;
        methods.free = [](llama_sampler *sampler) { delete static_cast<TailFree *>(sampler->ctx); };
        return methods;
    }();
    return llama_sampler_init(&interface, new TailFree{z, {}});
}

void validate(const trio_model &model, const trio_sampler_params &params) {
    constexpr float big = 1e6f;
    check(std::isfinite(params.temperature), "temperature must be finite");
    check(is_finite_in_range(params.dynatemp_range, 0, big), "dynatemp_range is out of range");
    check(is_finite_in_range(params.dynatemp_exponent, 0, big), "dynatemp_exponent is out of range");
    check(is_finite_in_range(params.top_p, 0, big), "top_p is out of range");
    check(is_finite_in_range(params.min_p, 0, 1), "min_p is out of range");
    check(is_finite_in_range(params.typical_p, 0, big), "typical_p is out of range");
    check(is_finite_in_range(params.tfs_z, 0, big), "tfs_z is out of range");
    check(is_finite_in_range(params.top_n_sigma, -big, big), "top_n_sigma is out of range");
    check(is_finite_in_range(params.xtc_probability, 0, 1), "xtc_probability is out of range");
    check(is_finite_in_range(params.xtc_threshold, 0, 1), "xtc_threshold is out of range");
    check(params.repeat_last_n >= -1, "repeat_last_n must be -1 or more");
    check(is_finite_in_range(params.repeat_penalty, 1e-6f, big), "repeat_penalty is out of range");
    check(is_finite_in_range(params.frequency_penalty, -big, big), "frequency_penalty is out of range");
    check(is_finite_in_range(params.presence_penalty, -big, big), "presence_penalty is out of range");
    check(is_finite_in_range(params.dry_multiplier, 0, big), "dry_multiplier is out of range");
    check(is_finite_in_range(params.dry_base, 0, big), "dry_base is out of range");
    check(params.dry_allowed_length >= 0, "dry_allowed_length must not be negative");
    check(params.dry_penalty_last_n >= -1, "dry_penalty_last_n must be -1 or more");
    check(params.n_dry_breakers >= 0 && params.n_dry_breakers <= 64, "n_dry_breakers is out of range");
    check(params.mirostat >= 0 && params.mirostat <= 2, "mirostat must be 0, 1 or 2");
    check(is_finite_in_range(params.mirostat_tau, 0, big), "mirostat_tau is out of range");
    check(is_finite_in_range(params.mirostat_eta, 0, big), "mirostat_eta is out of range");
    check(params.n_bias >= 0 && params.n_bias <= model.info.n_vocab, "n_bias is out of range");
    check(params.n_top >= -1 && params.n_top <= model.info.n_vocab, "n_top is out of range");
    for (int32_t i = 0; i < params.n_dry_breakers; ++i) {
        check_pointer(check_pointer(params.dry_breakers, "dry_breakers")[i], "a DRY breaker");
    }
    for (int32_t i = 0; i < params.n_bias; ++i) {
        model.check_token(check_pointer(params.bias_tokens, "bias_tokens")[i]);
        const float value = check_pointer(params.bias_values, "bias_values")[i];
        check(value == NEVER || is_finite_in_range(value, -1e9f, 1e9f),
              "a bias is neither finite nor negative infinity");
    }
}

int32_t window_of(int32_t last_n, const trio_model &model) {
    const int32_t n_ctx_train = std::clamp(model.info.n_ctx_train, 1, MAX_WINDOW);
    return last_n < 0 ? n_ctx_train : std::min(last_n, n_ctx_train);
}

std::vector<llama_logit_bias> biases(const trio_sampler_params &params) {
    std::vector<llama_logit_bias> bias(static_cast<size_t>(params.n_bias));
    for (size_t i = 0; i < bias.size(); ++i)
        bias[i] = {params.bias_tokens[i], params.bias_values[i]};
    return bias;
}

} // namespace

// ---- penalties -----------------------------------------------------------------------------------------------------

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

// ---- the head of the vocabulary ------------------------------------------------------------------------------------

size_t trio::select_top(const float *logits, int32_t n_vocab, int32_t k, llama_token_data *best) {
    const auto precedes = [](const llama_token_data &a, const llama_token_data &b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    // A heap of the best so far, its root the last of them. What comes later must be greater: equal ones come too late.
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

// ---- the sampler ---------------------------------------------------------------------------------------------------

trio_sampler::trio_sampler(trio_model *owner, const trio_sampler_params &params)
    : model(owner), n_top(params.n_top), bias(biases(params)),
      penalties(window_of(params.repeat_last_n, *owner), params.repeat_penalty, params.frequency_penalty,
                params.presence_penalty, params.penalize_nl ? -1 : owner->info.token_nl),
      prompt_window(penalties.enabled() ? window_of(params.repeat_last_n, *owner) : 0) {
    if (params.dry_multiplier > 0.0f && params.dry_base >= 1.0f && params.dry_penalty_last_n != 0) {
        const int32_t window = window_of(params.dry_penalty_last_n, *owner);
        prompt_window = std::max(prompt_window, window);
        std::vector<const char *> breakers(params.dry_breakers, params.dry_breakers + params.n_dry_breakers);
        dry.reset(llama_sampler_init_dry(owner->vocab, params.dry_multiplier, params.dry_base,
                                         params.dry_allowed_length, window, breakers.data(), breakers.size()));
    }

    const auto add = [this](llama_sampler *sampler) {
        if (sampler == nullptr) throw Failure(TRIO_E_NATIVE, "llama.cpp could not make a sampler");
        chain.emplace_back(sampler);
    };
    const bool greedy = params.temperature <= 0.0f || (params.mirostat == 0 && params.top_k == 1);
    if (!greedy) {
        const float temperature = std::max(params.temperature, MIN_TEMPERATURE);
        if (params.mirostat != 0) {
            add(llama_sampler_init_temp(temperature));
            add(params.mirostat == 1
                    ? llama_sampler_init_mirostat(owner->info.n_vocab, params.seed, params.mirostat_tau,
                                                  params.mirostat_eta, MIROSTAT_M)
                    : llama_sampler_init_mirostat_v2(params.seed, params.mirostat_tau, params.mirostat_eta));
        } else {
            if (params.top_n_sigma > 0.0f) add(llama_sampler_init_top_n_sigma(params.top_n_sigma));
            if (params.top_k > 0) add(llama_sampler_init_top_k(params.top_k));
            if (params.tfs_z < 1.0f) add(tail_free_init(params.tfs_z));
            if (params.typical_p < 1.0f) add(llama_sampler_init_typical(params.typical_p, MIN_KEEP));
            if (params.top_p < 1.0f) add(llama_sampler_init_top_p(params.top_p, MIN_KEEP));
            if (params.min_p > 0.0f) add(llama_sampler_init_min_p(params.min_p, MIN_KEEP));
            if (params.xtc_probability > 0.0f) {
                add(llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, MIN_KEEP, params.seed));
            }
            add(llama_sampler_init_temp_ext(temperature, params.dynatemp_range, params.dynatemp_exponent));
            add(llama_sampler_init_dist(params.seed));
        }
    }
    const bool cut_first = params.mirostat == 0 && params.top_n_sigma <= 0.0f && params.top_k > 0;
    if (!dry && (greedy || cut_first)) {
        const int32_t n_enough = greedy ? 1 : std::min(params.top_k, owner->info.n_vocab);
        n_head = n_enough <= MAX_HEAD ? n_enough : 0;
    }

    if (params.grammar != nullptr && params.grammar[0] != '\0') {
        check(owner->info.has_vocab != 0, "the model has no vocabulary to apply a grammar to");
        // The parser and its check for left recursion recurse with the grammar.
        on_big_stack(std::strlen(params.grammar),
                     [&] { grammar.reset(llama_sampler_init_grammar(owner->vocab, params.grammar, "root")); });
        if (!grammar) {
            const std::string errors = Scope::errors();
            throw Failure(TRIO_E_GRAMMAR, errors.empty() ? "the grammar does not parse" : errors);
        }
        grammar_soft_limit = std::max(GRAMMAR_SECONDS, GRAMMAR_SECONDS_PER_TOKEN_OF_VOCABULARY * owner->info.n_vocab);
    }
}

void trio_sampler::accept_prompt(const int32_t *tokens, int32_t n_tokens) {
    for (int32_t i = std::max(0, n_tokens - prompt_window); i < n_tokens; ++i) {
        penalties.accept(tokens[i]);
        if (dry) llama_sampler_accept(dry.get(), tokens[i]);
    }
}

// The logits with biases and penalties: a copy, unless there are none.
const float *trio_sampler::adjust(const float *logits, Scratch &scratch) const {
    if (bias.empty() && penalties.idle()) return logits;
    std::copy_n(logits, model->info.n_vocab, scratch.logits.data());
    for (const llama_logit_bias &entry : bias)
        scratch.logits[size_t(entry.token)] += entry.bias;
    penalties.apply(scratch.logits.data());
    return scratch.logits.data();
}

// In vocabulary order.
llama_token_data_array trio_sampler::all_candidates(const float *adjusted, Scratch &scratch) {
    std::vector<llama_token_data> &candidates = scratch.candidates;
    for (size_t token = 0; token < candidates.size(); ++token) {
        candidates[token] = {int32_t(token), adjusted[token], 0.0f};
    }
    llama_token_data_array array{candidates.data(), candidates.size(), -1, false};
    if (dry) llama_sampler_apply(dry.get(), &array);
    return array;
}

// What the chain would look at, without a list of the whole vocabulary.
llama_token_data_array trio_sampler::head_candidates(const float *adjusted, Scratch &scratch) const {
    const size_t size = select_top(adjusted, model->info.n_vocab, n_head, scratch.candidates.data());
    return {scratch.candidates.data(), size, -1, true};
}

// Forbidden candidates are dropped first: some samplers count them, others divide by their probability. -1: none is
// left.
int32_t trio_sampler::choose(llama_token_data_array array) {
    llama_token_data *end = std::remove_if(array.data, array.data + array.size,
                                           [](const llama_token_data &candidate) { return candidate.logit == NEVER; });
    array.size = size_t(end - array.data);
    if (array.size == 0) return -1;
    if (chain.empty()) {
        return std::max_element(array.data, end,
                                [](const llama_token_data &a, const llama_token_data &b) { return a.logit < b.logit; })
            ->id;
    }
    for (const SamplerPtr &sampler : chain)
        llama_sampler_apply(sampler.get(), &array);
    if (array.selected < 0 || size_t(array.selected) >= array.size) {
        throw Failure(TRIO_E_NATIVE, "the samplers chose no token");
    }
    return array.data[array.selected].id;
}

void trio_sampler::charge_grammar(double seconds) {
    if (seconds <= grammar_soft_limit) return;
    if (seconds > grammar_soft_limit * GRAMMAR_HARD_FACTOR || ++n_slow_grammar_steps >= MAX_SLOW_GRAMMAR_STEPS) {
        throw Failure(TRIO_E_GRAMMAR, "the grammar is too complex: one token took " +
                                          std::to_string(int(milliseconds(seconds))) + " ms");
    }
}

int32_t trio_sampler::sample(const float *logits, Scratch &scratch) {
    if (broken) throw Failure(TRIO_E_INVALID, "the sampler failed before and cannot go on");
    broken = true; // until this token is accepted everywhere

    if (!are_numbers(logits, model->info.n_vocab)) {
        throw Failure(TRIO_E_NATIVE, "the model computed logits that are not numbers");
    }
    const float *adjusted = adjust(logits, scratch);
    int32_t token = choose(n_head > 0 ? head_candidates(adjusted, scratch) : all_candidates(adjusted, scratch));
    if (token < 0) throw Failure(TRIO_E_NATIVE, "every token is forbidden");

    if (grammar) {
        const double limit = grammar_soft_limit * GRAMMAR_HARD_FACTOR;
        double spent = 0.0;
        llama_token_data alone{token, 0.0f, 0.0f};
        llama_token_data_array single{&alone, 1, -1, false};
        apply_in_slices(grammar.get(), single, limit, spent);
        if (alone.logit == NEVER) {
            llama_token_data_array array = all_candidates(adjusted, scratch);
            apply_in_slices(grammar.get(), array, limit, spent);
            if (spent > limit) charge_grammar(spent); // throws
            token = choose(array);
            if (token < 0) throw Failure(TRIO_E_GRAMMAR, "no token can satisfy the grammar here");
        }
        const double started = thread_seconds();
        llama_sampler_accept(grammar.get(), token);
        charge_grammar(spent + thread_seconds() - started);
    }
    penalties.accept(token);
    if (dry) llama_sampler_accept(dry.get(), token);
    broken = false;
    return token;
}

// ---- the C surface -------------------------------------------------------------------------------------------------

extern "C" {

int32_t trio_sampler_open(const trio_model *model, const trio_sampler_params *params, trio_sampler **sampler) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(params, "params");
        *check_pointer(sampler, "sampler") = nullptr;
        validate(*model, *params);
        *sampler = new trio_sampler(const_cast<trio_model *>(model), *params); // only its reference count changes
        return TRIO_OK;
    });
}

int32_t trio_sampler_accept_prompt(trio_sampler *sampler, const int32_t *tokens, int32_t n_tokens) {
    return guard([&] {
        check_pointer(sampler, "sampler");
        check(n_tokens >= 0, "n_tokens is negative");
        check(tokens != nullptr || n_tokens == 0, "tokens is NULL");
        for (int32_t i = 0; i < n_tokens; ++i)
            sampler->model->check_token(tokens[i]);
        sampler->accept_prompt(tokens, n_tokens);
        return TRIO_OK;
    });
}

void trio_sampler_free(trio_sampler *sampler) {
    guard([&] {
        delete sampler;
        return TRIO_OK;
    });
}

} // extern "C"
