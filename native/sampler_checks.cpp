// What a sampler refuses: parameters on which llama.cpp would abort, or compute what are not numbers.

#include "sampler.h"

#include <cmath>

using namespace trio;

namespace {

bool is_finite_in_range(float value, float low, float high) {
    return std::isfinite(value) && value >= low && value <= high;
}

} // namespace

void trio::check_sampler_params(const trio_model &model, const trio_sampler_params &params) {
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
    check(params.json_schema == nullptr || params.grammar == nullptr || params.grammar[0] == '\0',
          "json_schema and grammar cannot be combined");
    check(params.json_schema == nullptr || params.json_schema->model.get() == &model,
          "json_schema was compiled for another model");
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
