// What a context refuses: each argument on which llama.cpp would abort, hang or read beyond its memory.

#include "context.h"

#include <algorithm>
#include <cmath>

#include "ggml.h"

using namespace trio;

namespace {

constexpr uint32_t MAX_BATCH = 1 << 16;
constexpr int32_t N_POOLING_TYPES = 5;
constexpr int32_t FEW_ROWS = 16; // up to here an operation costs about as much as waiting for all threads

bool is_kv_type(int32_t type) {
    switch (type) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_Q5_1:
    case GGML_TYPE_Q5_0:
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_IQ4_NL:
        return true;
    default:
        return false;
    }
}

void check_positions(const trio_context_info &info, const int32_t *positions, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if (positions[i] < 0 || positions[i] >= info.n_positions) {
            throw Refused("position " + std::to_string(positions[i]) + " is outside the context of " +
                          std::to_string(info.n_positions));
        }
    }
}

void check_inputs(const trio_context_info &info, const trio_batch &batch) {
    check(info.n_embd_in > 0, "the model takes tokens only");
    check(batch.tokens == nullptr, "a batch has either tokens or inputs");
    // A NaN would spread from its cell, even to sequences that do not see that cell.
    const size_t n = size_t(batch.n_rows) * size_t(info.n_embd_in);
    check(std::all_of(batch.inputs, batch.inputs + n, [](float value) { return std::isfinite(value); }),
          "an input is not a finite number");
}

// Returns whether the batch is narrow.
bool check_rows(trio_context &context, const trio_batch &batch) {
    const trio_context_info &info = context.info;
    const auto n_rows = size_t(batch.n_rows);
    check_pointer(batch.positions, "positions");
    check_pointer(batch.seqs, "seqs");
    if (batch.inputs != nullptr) {
        check_inputs(info, batch);
    } else {
        check_pointer(batch.tokens, "tokens");
        for (size_t row = 0; row < n_rows; ++row)
            context.model->check_token(batch.tokens[row]);
    }
    check_positions(info, batch.positions, n_rows * size_t(batch.inputs != nullptr ? info.n_input_positions : 1));
    const bool may_share = batch.inputs != nullptr && info.n_input_positions > 1;
    bool is_narrow = batch.n_rows <= FEW_ROWS;
    std::fill(context.last_positions.begin(), context.last_positions.end(), -1);
    for (size_t row = 0; row < n_rows; ++row) {
        context.check_seq(batch.seqs[row]);
        const int32_t position = batch.positions[row];
        int32_t &last_position = context.last_positions[size_t(batch.seqs[row])];
        if (may_share) {
            check(position >= last_position, "positions of a sequence must not decrease");
        } else { // llama.cpp itself would accept the same position twice
            check(last_position < 0 || position == last_position + 1, "positions of a sequence must be consecutive");
        }
        is_narrow = is_narrow && last_position < 0;
        last_position = position;
    }
    return is_narrow;
}

} // namespace

void trio::check_context_params(const trio_model &model, const trio_context_params &params) {
    check(!model.vocab_only, "the model was loaded without its weights");
    // A model that drafts for another one takes the output of that one's layers as its input.
    check(!model.info.has_encoder || model.architecture == "t5" || model.architecture == "t5encoder",
          "a model that only drafts for another one cannot be used by itself");
    check(model.info.has_decoder || model.info.has_encoder, "the model has neither encoder nor decoder");
    check(params.n_ctx >= 1 && params.n_ctx <= uint32_t(INT32_MAX), "n_ctx is out of range");
    check(params.n_batch >= 1 && params.n_batch <= MAX_BATCH, "n_batch is out of range");
    check(params.n_ubatch >= 1 && params.n_ubatch <= params.n_batch, "n_ubatch must be between 1 and n_batch");
    check(params.n_seq_max >= 1 && params.n_seq_max <= llama_max_parallel_sequences(), "n_seq_max is out of range");
    check(params.n_ubatch >= params.n_seq_max, "n_ubatch must not be less than n_seq_max");
    check(params.n_threads >= 1 && params.n_threads <= MAX_THREADS, "n_threads must be between 1 and 512");
    check(params.n_threads_batch >= 1 && params.n_threads_batch <= MAX_THREADS,
          "n_threads_batch must be between 1 and 512");
    check(params.flash_attention >= -1 && params.flash_attention <= 1, "flash_attention must be -1, 0 or 1");
    check(is_kv_type(params.type_k) && is_kv_type(params.type_v), "the KV cache cannot have this type");
    check(params.pooling_type >= -1 && params.pooling_type < N_POOLING_TYPES, "pooling_type is out of range");
    check(params.pooling_type != LLAMA_POOLING_TYPE_RANK || model.info.pooling_type == LLAMA_POOLING_TYPE_RANK,
          "only a model trained to rank can pool by rank");
    check(std::isfinite(params.rope_freq_base) && params.rope_freq_base >= 0.0f, "rope_freq_base is out of range");
    check(std::isfinite(params.rope_freq_scale) && params.rope_freq_scale >= 0.0f, "rope_freq_scale is out of range");
}

bool trio::check_batch(trio_context &context, const trio_batch &batch) {
    const trio_context_info &info = context.info;
    check(batch.n_rows >= 1 && batch.n_rows <= info.n_batch, "n_rows must be between 1 and n_batch");
    check((info.has_memory && info.causal && !batch.non_causal) || batch.n_rows <= info.n_ubatch,
          "attention is non-causal: n_rows must not be more than n_ubatch");
    check(info.has_memory || batch.embeddings, "the model computes embeddings only");
    check(!info.has_encoder || !batch.embeddings, "an encoder-decoder model computes no embeddings");
    check_pointer(batch.outputs, "outputs");
    const bool is_narrow = check_rows(context, batch);
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        check(batch.outputs[row] == 0 || batch.outputs[row] == 1, "outputs must be 0 or 1");
        check(!info.has_encoder || context.has_encoder_tokens[size_t(batch.seqs[row])],
              "the encoder has read nothing for a sequence");
    }
    return is_narrow;
}

bool trio::check_encoder_batch(trio_context &context, const trio_batch &batch) {
    check(context.info.has_encoder != 0, "the model has no encoder beside its decoder");
    check(batch.n_rows >= 1 && batch.n_rows <= context.info.n_ubatch, "n_rows must be between 1 and n_ubatch");
    check(batch.inputs == nullptr, "an encoder takes tokens only");
    const bool is_narrow = check_rows(context, batch);
    std::fill(context.last_positions.begin(), context.last_positions.end(), -1);
    for (int32_t row = 0; row < batch.n_rows; ++row)
        check(batch.positions[row] == ++context.last_positions[size_t(batch.seqs[row])],
              "encoder tokens begin at position 0");
    return is_narrow;
}

void trio::check_request(trio_context &context, const trio_batch &batch, const trio_sample_request *request,
                         const trio_sample_result *result) {
    if (request == nullptr || request->n_samples == 0) return;
    check(request->n_samples > 0 && request->n_samples <= batch.n_rows, "n_samples is out of range");
    check(!batch.embeddings, "an embeddings batch has nothing to sample");
    check_pointer(request->rows, "rows");
    check_pointer(request->samplers, "samplers");
    check_pointer(result, "result");
    check_pointer(result->sampled, "sampled");
    check_pointer(result->pieces, "pieces");
    check(result->pieces_size >= 0 && result->top_stride >= 0, "a size of the result is negative");
    for (int32_t i = 0; i < request->n_samples; ++i) {
        const int32_t row = request->rows[i];
        check(row >= 0 && row < batch.n_rows, "a row to sample is out of range");
        check(batch.outputs[row] == 1, "a row to sample has no output");
        trio_sampler &sampler = *check_pointer(request->samplers[i], "a sampler");
        check(sampler.model.get() == context.model.get(), "a sampler belongs to another model");
        check(sampler.step != context.step, "one sampler may serve only one row");
        check(sampler.n_top <= 0 || (result->top_tokens && result->top_logprobs && result->top_stride >= sampler.n_top),
              "the top arrays are too small");
        sampler.step = context.step;
    }
}
