// Samplers: from one row of logits to one token.
//
// A JSON schema comes first: what it does not allow is no candidate. Then the order is the original runner's: biases,
// penalties, DRY; then the truncating samplers; then temperature and the draw. A grammar comes last: the token is chosen
// without it and checked against it alone. Only if the grammar refuses it are all candidates checked, and the choice
// made again. So a grammar costs almost nothing while the model obeys it by itself.

#include "sampler.h"

#include <algorithm>
#include <cstring>

using namespace trio;

namespace {

constexpr int32_t MAX_WINDOW = 1 << 20;  // tokens; DRY allocates its window at once
constexpr float MIN_TEMPERATURE = 1e-6f; // keeps logit / temperature finite
constexpr int32_t MIROSTAT_M = 100;      // the value in the paper (https://arxiv.org/abs/2007.14966)

// An ambiguous grammar grows with every token, and a step of it cannot be interrupted. So it is stopped while its steps
// still end. Checking a large vocabulary against a good grammar costs about a microsecond for each entry.
constexpr double GRAMMAR_SECONDS = 0.05;
constexpr double GRAMMAR_SECONDS_PER_TOKEN_OF_VOCABULARY = 1e-6;
constexpr double GRAMMAR_HARD_FACTOR = 5.0;
constexpr int32_t MAX_SLOW_GRAMMAR_STEPS = 3;

// Candidates that are checked between two looks at the clock: twice as many after a quick slice, half after a slow one.
// Each slice walks through the grammar again, so a single slice would be the cheapest.
constexpr size_t FIRST_GRAMMAR_SLICE = 64;
constexpr size_t MIN_GRAMMAR_SLICE = 8;
constexpr double QUICK_GRAMMAR_SLICE = 0.01; // seconds
constexpr double SLOW_GRAMMAR_SLICE = 0.05;

constexpr int32_t MAX_HEAD = 1024; // from a few thousand on, llama.cpp's sort into buckets is faster than a heap

// Checks the candidates against the grammar. Each is judged by itself, so the result is that of one call for all,
// unless it takes longer than `limit` seconds: then it stops half-way. Adds the seconds to `spent`.
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

int32_t window_of(int32_t last_n, const trio_model &model) {
    const int32_t n_ctx_train = std::clamp(model.info.n_ctx_train, 1, MAX_WINDOW);
    return last_n < 0 ? n_ctx_train : std::min(last_n, n_ctx_train);
}

std::vector<llama_logit_bias> biases(const trio_sampler_params &params, const trio_model &model) {
    std::vector<llama_logit_bias> bias(static_cast<size_t>(params.n_bias));
    for (size_t i = 0; i < bias.size(); ++i)
        bias[i] = {params.bias_tokens[i], params.bias_values[i]};
    if (params.ignore_eos != 0) {
        for (const int32_t token : model.end_tokens)
            bias.push_back({token, NEVER});
    }
    return bias;
}

} // namespace

trio_sampler::trio_sampler(trio_model *owner, const trio_sampler_params &params)
    : model(owner), n_top(params.n_top), post_sampling_probs(params.post_sampling_probs != 0),
      bias(biases(params, *owner)),
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
    const bool is_greedy = params.temperature <= 0.0f || (params.mirostat == 0 && params.top_k == 1);
    if (!is_greedy) make_chain(params);
    const bool begins_with_top_k = params.mirostat == 0 && params.top_n_sigma <= 0.0f && params.top_k > 0;
    if (!dry && (is_greedy || begins_with_top_k)) {
        const int32_t n_enough = is_greedy ? 1 : std::min(params.top_k, owner->info.n_vocab);
        n_head = n_enough <= MAX_HEAD ? n_enough : 0;
    }
    if (params.grammar != nullptr && params.grammar[0] != '\0') make_grammar(params.grammar);
    if (params.json_schema != nullptr) schema = std::make_unique<SchemaMatcher>(*params.json_schema);
}

void trio_sampler::make_chain(const trio_sampler_params &params) {
    const auto add = [this](llama_sampler *sampler) {
        if (sampler == nullptr) throw Failure(TRIO_E_NATIVE, "llama.cpp could not make a sampler");
        chain.emplace_back(sampler);
    };
    const float temperature = std::max(params.temperature, MIN_TEMPERATURE);
    if (params.mirostat != 0) {
        add(llama_sampler_init_temp(temperature));
        add(params.mirostat == 1
                ? llama_sampler_init_mirostat(model->info.n_vocab, params.seed, params.mirostat_tau,
                                              params.mirostat_eta, MIROSTAT_M)
                : llama_sampler_init_mirostat_v2(params.seed, params.mirostat_tau, params.mirostat_eta));
        return;
    }
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

void trio_sampler::make_grammar(const char *text) {
    check(model->info.has_vocab != 0, "the model has no vocabulary to apply a grammar to");
    // The parser and its check for left recursion recurse with the grammar.
    on_big_stack(std::strlen(text), [&] { grammar.reset(llama_sampler_init_grammar(model->vocab, text, "root")); });
    if (!grammar) {
        const std::string errors = Scope::errors();
        throw Failure(TRIO_E_GRAMMAR, errors.empty() ? "the grammar does not parse" : errors);
    }
    grammar_soft_limit = std::max(GRAMMAR_SECONDS, GRAMMAR_SECONDS_PER_TOKEN_OF_VOCABULARY * model->info.n_vocab);
}

void trio_sampler::accept_prompt(const int32_t *tokens, int32_t n_tokens) {
    for (int32_t i = std::max(0, n_tokens - prompt_window); i < n_tokens; ++i) {
        penalties.accept(tokens[i]);
        if (dry) llama_sampler_accept(dry.get(), tokens[i]);
    }
}

// The logits of the tokens that the schema allows, with biases and penalties: a copy, unless there is none of these.
const float *trio_sampler::adjust(const float *logits, Scratch &scratch) {
    if (!schema && bias.empty() && penalties.idle()) return logits;
    if (schema) {
        schema->mask(logits, scratch.logits.data());
    } else {
        std::copy_n(logits, model->info.n_vocab, scratch.logits.data());
    }
    for (const llama_logit_bias &entry : bias)
        scratch.logits[size_t(entry.token)] += entry.bias;
    penalties.apply(scratch.logits.data());
    return scratch.logits.data();
}

// The whole vocabulary, in its order.
llama_token_data_array trio_sampler::all_candidates(const float *adjusted, Scratch &scratch) {
    std::vector<llama_token_data> &candidates = scratch.candidates;
    for (size_t token = 0; token < candidates.size(); ++token) {
        candidates[token] = {int32_t(token), adjusted[token], 0.0f};
    }
    llama_token_data_array array{candidates.data(), candidates.size(), -1, false};
    if (dry) llama_sampler_apply(dry.get(), &array);
    return array;
}

// Only the tokens that the schema allows, in the order of the vocabulary.
llama_token_data_array trio_sampler::allowed_candidates(const float *adjusted, Scratch &scratch) {
    llama_token_data_array array{scratch.candidates.data(), schema->list(adjusted, scratch.candidates.data()), -1, false};
    if (dry) llama_sampler_apply(dry.get(), &array);
    return array;
}

// Only the candidates that the chain would keep, without a list of the whole vocabulary.
llama_token_data_array trio_sampler::head_candidates(const float *adjusted, Scratch &scratch) const {
    const size_t size = select_top(adjusted, model->info.n_vocab, n_head, scratch.candidates.data());
    return {scratch.candidates.data(), size, -1, true};
}

// Chooses a token. Returns -1 if all are forbidden. Forbidden candidates are removed first: some samplers count them,
// others divide by their probability.
int32_t trio_sampler::choose(llama_token_data_array array) {
    llama_token_data *end = std::remove_if(array.data, array.data + array.size,
                                           [](const llama_token_data &candidate) { return candidate.logit == NEVER; });
    array.size = size_t(end - array.data);
    if (array.size == 0) return -1;
    if (chain.empty()) {
        llama_token_data *best =
            std::max_element(array.data, end, [](const llama_token_data &a, const llama_token_data &b) {
                return a.logit < b.logit;
            });
        choice = {best, 1, 0, true};
        return best->id;
    }
    for (const SamplerPtr &sampler : chain)
        llama_sampler_apply(sampler.get(), &array);
    if (array.selected < 0 || size_t(array.selected) >= array.size) {
        throw Failure(TRIO_E_NATIVE, "the samplers chose no token");
    }
    choice = array;
    return array.data[array.selected].id;
}

// Returns the token if the grammar allows it, else one that it allows, and moves the grammar on.
int32_t trio_sampler::obey_grammar(int32_t token, const float *adjusted, Scratch &scratch) {
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
    return token;
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
    broken = true; // until every part has accepted this token

    if (!are_numbers(logits, model->info.n_vocab)) {
        throw Failure(TRIO_E_NATIVE, "the model computed logits that are not numbers");
    }
    if (schema) schema->find_allowed();
    const float *adjusted = adjust(logits, scratch);
    const bool is_short = schema && schema->allows_few();
    int32_t token = choose(is_short     ? allowed_candidates(adjusted, scratch)
                           : n_head > 0 ? head_candidates(adjusted, scratch)
                                        : all_candidates(adjusted, scratch));
    if (token < 0 && schema) throw Failure(TRIO_E_GRAMMAR, "every token that the schema allows here is forbidden");
    if (token < 0) throw Failure(TRIO_E_NATIVE, "every token is forbidden");
    if (grammar) token = obey_grammar(token, adjusted, scratch);
    if (schema) schema->accept(token);
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
        check_sampler_params(*model, *params);
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

int32_t trio_sampler_sample(trio_sampler *sampler, const float *logits, int32_t n_logits) {
    return guard([&] {
        check_pointer(sampler, "sampler");
        check_pointer(logits, "logits");
        check(n_logits == sampler->model->info.n_vocab, "n_logits is not the size of the vocabulary");
        static thread_local std::unique_ptr<Scratch> scratch; // measuring its allocation would be misleading
        if (!scratch || scratch->logits.size() != size_t(n_logits)) scratch = std::make_unique<Scratch>(n_logits);
        return sampler->sample(logits, *scratch);
    });
}

void trio_sampler_free(trio_sampler *sampler) {
    guard([&] {
        delete sampler;
        return TRIO_OK;
    });
}

} // extern "C"
