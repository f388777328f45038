// The sampler of one sequence, and what it works on. For sampler.cpp and context_step.cpp.
#pragma once

#include "internal.h"
#include "schema.h"

#include <limits>
#include <unordered_map>

namespace trio {

constexpr float NEVER = -std::numeric_limits<float>::infinity(); // the logit of a forbidden token
constexpr size_t MIN_KEEP = 1;                                   // candidates that a truncating sampler leaves

struct SamplerDeleter {
    void operator()(llama_sampler *sampler) const { llama_sampler_free(sampler); }
};
using SamplerPtr = std::unique_ptr<llama_sampler, SamplerDeleter>;

// Throws Refused for a parameter out of range. Defined in sampler_checks.cpp.
void check_sampler_params(const trio_model &model, const trio_sampler_params &params);

// Tail-free sampling, a sampler of llama.cpp's kind. Defined in tail_free.cpp.
llama_sampler *tail_free_init(float z);

// The three penalties on repeated tokens. llama.cpp's own sampler looks up every candidate in a hash table; this one
// visits only the tokens of the window. Defined in candidates.cpp.
class Penalties {
public:
    Penalties(int32_t window, float repeat, float frequency, float presence, int32_t exempt_token)
        : window_(window), repeat_(repeat), frequency_(frequency), presence_(presence), exempt_token_(exempt_token) {}
    bool enabled() const { return window_ > 0 && (repeat_ != 1.0f || frequency_ != 0.0f || presence_ != 0.0f); }
    bool idle() const { return counts_.empty(); }
    void accept(int32_t token);
    void apply(float *logits) const;

private:
    int32_t window_;
    float repeat_, frequency_, presence_;
    int32_t exempt_token_; // -1: none
    std::vector<int32_t> ring_;
    size_t oldest_ = 0;
    std::unordered_map<int32_t, int32_t> counts_;
};

// Writes the k candidates with the greatest logits to `best`, the greatest first; among equal ones the lower token
// comes first. Those of negative infinity are left out. `best` has room for k. Returns how many there are. Defined in
// candidates.cpp.
size_t select_top(const float *logits, int32_t n_vocab, int32_t k, llama_token_data *best);

// Whether no logit is NaN or positive infinity. Defined in candidates.cpp.
bool are_numbers(const float *logits, int32_t n_vocab);

// The memory for choosing one token: room for the whole vocabulary.
struct Scratch {
    explicit Scratch(int32_t n_vocab) : logits(size_t(n_vocab)), candidates(size_t(n_vocab)) {}
    std::vector<float> logits;
    std::vector<llama_token_data> candidates;
};

} // namespace trio

struct trio_sampler {
    trio_sampler(trio_model *owner, const trio_sampler_params &params);

    // Chooses a token from one row of logits and remembers it. Throws Failure; then the sampler cannot be used again.
    int32_t sample(const float *logits, trio::Scratch &scratch);
    bool ended() const { return schema && schema->ended(); } // the schema lets nothing follow
    void accept_prompt(const int32_t *tokens, int32_t n_tokens);

    trio::ModelReference model;
    int32_t n_top;
    bool post_sampling_probs;
    // The candidates that the last choice was made from, with post_sampling_probs. They lie in that choice's Scratch.
    llama_token_data_array choice{nullptr, 0, -1, false};
    uint64_t step = 0;   // the last trio_step that used it: one sampler serves only one row
    bool broken = false; // it failed in the middle of a token

private:
    void make_chain(const trio_sampler_params &params);
    void make_grammar(const char *text);
    const float *adjust(const float *logits, trio::Scratch &scratch);
    llama_token_data_array all_candidates(const float *adjusted, trio::Scratch &scratch);
    llama_token_data_array allowed_candidates(const float *adjusted, trio::Scratch &scratch);
    llama_token_data_array head_candidates(const float *adjusted, trio::Scratch &scratch) const;
    int32_t choose(llama_token_data_array array);
    int32_t obey_grammar(int32_t token, const float *adjusted, trio::Scratch &scratch);
    void charge_grammar(double seconds);

    std::unique_ptr<trio::SchemaMatcher> schema;
    std::vector<llama_logit_bias> bias;
    trio::Penalties penalties;
    int32_t prompt_window; // tokens at the end of the prompt that any penalty looks at
    trio::SamplerPtr dry;
    std::vector<trio::SamplerPtr> chain; // the last one selects; empty: greedy
    int32_t n_head = 0;                  // the chain sees only this many of the best candidates; 0: all
    trio::SamplerPtr grammar;
    double grammar_soft_limit = 0.0; // seconds
    int32_t n_slow_grammar_steps = 0;
};
