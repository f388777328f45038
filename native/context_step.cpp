// The step: decodes a batch and samples from it.

#include "context.h"

#include <algorithm>
#include <cmath>
#include <limits>

using namespace trio;

namespace {

// Logits in one step from which on a few threads are quicker than the caller's thread alone, in spite of waking them.
constexpr int64_t MUCH_TO_SAMPLE = 1 << 18;
constexpr int32_t MAX_SAMPLERS_AT_ONCE = 8;

// While alive, attention is non-causal: a row also sees later rows of its sequence.
class NonCausal {
public:
    NonCausal(llama_context *context, bool wanted)
        : context_(context), wanted_(wanted && llama_get_causal_attn(context)) {
        if (wanted_) llama_set_causal_attn(context_, false);
    }
    ~NonCausal() {
        if (wanted_) llama_set_causal_attn(context_, true);
    }
    NonCausal(const NonCausal &) = delete;
    NonCausal &operator=(const NonCausal &) = delete;

private:
    llama_context *context_;
    bool wanted_;
};

// ---- sampling ------------------------------------------------------------------------------------------------------

// Writes log-probabilities of the model itself: of the chosen token, and of the n most probable ones. `best` is
// scratch.
void report_probabilities(const float *logits, int32_t n_vocab, int32_t n_top, llama_token_data *best,
                          trio_sampled &sampled, int32_t *top_tokens, float *top_logprobs) {
    const float highest = *std::max_element(logits, logits + n_vocab);
    double sum = 0.0;
    for (int32_t token = 0; token < n_vocab; ++token)
        sum += std::exp(logits[token] - highest);
    const double log_sum = highest + std::log(sum);
    const auto logprob = [&](int32_t token) { return float(logits[token] - log_sum); };
    sampled.logprob = logprob(sampled.token);
    if (n_top <= 0) return;

    sampled.n_top = int32_t(select_top(logits, n_vocab, n_top, best));
    for (int32_t i = 0; i < sampled.n_top; ++i) {
        top_tokens[i] = best[i].id;
        top_logprobs[i] = logprob(best[i].id);
    }
}

// The same of the candidates that all samplers have left, of which one was drawn. Changes their order.
void report_choice(llama_token_data_array choice, int32_t n_top, trio_sampled &sampled, int32_t *top_tokens,
                   float *top_logprobs) {
    const float chosen = choice.data[choice.selected].logit;
    const auto precedes = [](const llama_token_data &a, const llama_token_data &b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    // Some samplers leave the candidates that they rule out where they are.
    llama_token_data *end = std::remove_if(choice.data, choice.data + choice.size, [](const llama_token_data &one) {
        return one.logit == -std::numeric_limits<float>::infinity();
    });
    if (choice.data == end) throw Failure(TRIO_E_NATIVE, "the samplers ruled every token out");
    sampled.n_top = int32_t(std::min(size_t(end - choice.data), size_t(std::max(n_top, 0))));
    std::partial_sort(choice.data, choice.data + std::max(sampled.n_top, 1), end, precedes);
    const float highest = choice.data[0].logit;
    double sum = 0.0;
    for (const llama_token_data *candidate = choice.data; candidate != end; ++candidate)
        sum += std::exp(candidate->logit - highest);
    const double log_sum = highest + std::log(sum);
    sampled.logprob = float(chosen - log_sum);
    for (int32_t i = 0; i < sampled.n_top; ++i) {
        top_tokens[i] = choice.data[i].id;
        top_logprobs[i] = float(choice.data[i].logit - log_sum);
    }
}

// A failure affects its own sequence only: it becomes the status of this sample, and the message takes the place of its
// piece.
void sample_one(const trio_context &context, int32_t index, const trio_sample_request &request, Scratch &scratch,
                trio_sample_result &result) {
    const trio_model &model = *context.model.get();
    const int32_t stride = result.pieces_size / request.n_samples;
    trio_sampled &sampled = result.sampled[index];
    sampled = {};
    sampled.token = -1;
    sampled.piece_offset = index * stride;
    char *piece = result.pieces + sampled.piece_offset;
    sampled.status = guard([&] {
        const float *logits = context.logits[size_t(index)];
        if (logits == nullptr) throw Failure(TRIO_E_NATIVE, "llama.cpp has no logits for the row");
        trio_sampler &sampler = *request.samplers[index];
        sampled.token = sampler.sample(logits, scratch);
        if (sampler.n_top >= 0) {
            const size_t offset = size_t(index) * size_t(result.top_stride);
            int32_t *top_tokens = result.top_tokens + offset;
            float *top_logprobs = result.top_logprobs + offset;
            if (sampler.post_sampling_probs) {
                report_choice(sampler.choice, sampler.n_top, sampled, top_tokens, top_logprobs);
            } else {
                report_probabilities(logits, model.info.n_vocab, sampler.n_top, scratch.candidates.data(), sampled,
                                     top_tokens, top_logprobs);
            }
        }
        if (!model.info.has_vocab) return TRIO_OK;
        sampled.is_end = llama_vocab_is_eog(model.vocab, sampled.token);
        if (sampled.is_end) return TRIO_OK;
        const int32_t n = llama_token_to_piece(model.vocab, sampled.token, piece, stride, 0, true);
        if (n < 0) throw Failure(TRIO_E_NATIVE, "the pieces buffer is too small");
        sampled.piece_length = n;
        sampled.is_end = sampler.ended();
        return TRIO_OK;
    });
    if (sampled.status == TRIO_OK) return;
    if (sampled.status != TRIO_E_GRAMMAR) sampled.status = TRIO_E_NATIVE;
    sampled.token = -1;
    sampled.piece_length = stride > 0 ? std::min(trio_last_error(piece, stride), stride - 1) : 0;
}

void sample(trio_context &context, const trio_sample_request &request, trio_sample_result &result) {
    const int32_t n = request.n_samples;
    context.logits.resize(size_t(n));
    for (int32_t index = 0; index < n; ++index) // may wait for a device, and must not run on two threads
        context.logits[size_t(index)] = llama_get_logits_ith(context.native.get(), request.rows[index]);
    if (n < 2 || int64_t(n) * context.model->info.n_vocab < MUCH_TO_SAMPLE || context.n_threads_batch < 2) {
        for (int32_t index = 0; index < n; ++index)
            sample_one(context, index, request, context.scratch.front(), result);
        return;
    }
    if (!context.sampling_team) {
        const int32_t n_workers = std::min(context.n_threads_batch, MAX_SAMPLERS_AT_ONCE) - 1;
        context.sampling_team = std::make_unique<ThreadTeam>(n_workers);
        while (context.scratch.size() < context.sampling_team->size())
            context.scratch.emplace_back(context.model->info.n_vocab);
    }
    context.sampling_team->run(n, [&](int32_t index, size_t member) {
        sample_one(context, index, request, context.scratch[member], result);
    });
}

// ---- decoding ------------------------------------------------------------------------------------------------------

// llama.cpp gets a copy of the rows, because it takes no pointers to constants.
llama_batch fill_native(trio_context &context, const trio_batch &batch) {
    const auto n_rows = size_t(batch.n_rows);
    llama_batch native{};
    native.n_tokens = batch.n_rows;
    if (batch.inputs != nullptr) {
        native.embd = const_cast<float *>(batch.inputs); // too many to copy, and only read
    } else {
        std::copy_n(batch.tokens, n_rows, context.tokens.begin());
        native.token = context.tokens.data();
    }
    const size_t n_positions = batch.inputs != nullptr ? n_rows * size_t(context.info.n_input_positions) : n_rows;
    std::copy_n(batch.positions, n_positions, context.positions.begin());
    for (size_t row = 0; row < n_rows; ++row) {
        if (context.has_shadows) {
            context.seqs[2 * row] = batch.seqs[row];
            context.seqs[2 * row + 1] = context.shadow(batch.seqs[row]);
        } else {
            context.seqs[row] = batch.seqs[row];
        }
    }
    native.pos = context.positions.data();
    native.n_seq_id = context.n_seq_ids.data();
    native.seq_id = context.seq_pointers.data();
    native.logits = context.native_outputs.data();
    return native;
}

// Removes the rows of an aborted batch, as llama.cpp does where it aborts by itself. A recurrent state is removed as a
// whole, later.
void forget_rows(trio_context &context, const trio_batch &batch) {
    if (context.memory == nullptr || context.is_recurrent) return;
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        if (row == 0 || batch.seqs[row - 1] != batch.seqs[row]) {
            context.remove(batch.seqs[row], batch.positions[row], -1);
        }
    }
}

int32_t decode(trio_context &context, const trio_batch &batch, bool is_narrow) {
    const auto n_rows = size_t(batch.n_rows);
    const llama_batch native = fill_native(context, batch);
    // llama.cpp outputs every row of an embeddings batch, and warns about each batch that did not ask for that.
    if (batch.embeddings) {
        std::fill_n(context.native_outputs.begin(), n_rows, int8_t(1));
    } else {
        std::copy_n(batch.outputs, n_rows, context.native_outputs.begin());
    }
    if (context.is_narrow != is_narrow) attach_threads(context, is_narrow);
    if (context.embeddings != (batch.embeddings != 0)) {
        llama_set_embeddings(context.native.get(), batch.embeddings != 0);
        context.embeddings = batch.embeddings != 0;
    }
    const NonCausal non_causal(context.native.get(), batch.non_causal != 0);
    std::unique_lock<std::mutex> planning(context.model->adapters_mutex, std::defer_lock);
    if (context.plan_pending) planning.lock();
    // An aborted K-shift would renumber positions and leave the keys as they were.
    context.abort_armed = !context.shift_pending;
    int32_t code = 0;
    try {
        code = llama_decode(context.native.get(), native);
    } catch (const BatchAborted &) {
        forget_rows(context, batch);
        code = 2;
    }
    // So far the work has only been queued on devices. A step ends when they have done it. Otherwise a failure would
    // show in a later call, and the batches of a prompt would queue up, with no way to abort between them.
    if (code == 0 && context.has_devices) llama_synchronize(context.native.get());
    context.abort_armed = true;
    if (code != -1) context.plan_pending = false;
    if (code == 0 || code == 2 || code < -1) context.shift_pending = false;
    return code;
}

int32_t encode(trio_context &context, const trio_batch &batch, bool is_narrow) {
    const llama_batch native = fill_native(context, batch);
    std::fill_n(context.native_outputs.begin(), size_t(batch.n_rows), int8_t(1));
    // llama.cpp wants positions that follow those of the decoder. To an encoder only distances matter.
    for (int32_t row = 0; row < batch.n_rows; ++row)
        native.pos[row] += context.last_position(batch.seqs[row]) + 1;
    if (context.is_narrow != is_narrow) attach_threads(context, is_narrow);
    std::unique_lock<std::mutex> planning(context.model->adapters_mutex, std::defer_lock);
    if (context.plan_pending) planning.lock();
    int32_t code = 0;
    try {
        code = llama_encode(context.native.get(), native);
    } catch (const BatchAborted &) {
        code = 2;
    }
    if (code == 0 && context.has_devices) llama_synchronize(context.native.get());
    if (code != -1) context.plan_pending = false;
    return code;
}

// Removes what an unfinished batch left. Its last micro-batch has overwritten the state of a recurrent model: nothing
// of these sequences is kept. In other models llama.cpp removes unfinished rows, but only from one sequence of each
// row, so that the shadows differ.
void forget_unfinished(trio_context &context, const trio_batch &batch) {
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        const int32_t seq = batch.seqs[row];
        if (context.is_recurrent) llama_memory_seq_rm(context.memory, seq, -1, -1);
        if (context.has_shadows) {
            const int32_t last = std::min(context.last_position(seq), context.last_position(context.shadow(seq)));
            context.remove(seq, last + 1, -1);
        }
    }
}

int32_t finish_decode(trio_context &context, const trio_batch &batch, int32_t code) {
    const std::string errors = Scope::errors();
    switch (code) {
    case 0:
        return TRIO_OK;
    case 1:
        set_last_error("the batch does not fit into the KV cache");
        return TRIO_NO_KV_SPACE;
    case 2:
        forget_unfinished(context, batch);
        set_last_error("aborted");
        return TRIO_ABORTED;
    case -1:
        throw Refused(errors.empty() ? "llama.cpp refused the batch" : errors);
    default:
        forget_unfinished(context, batch);
        set_last_error(errors.empty() ? "llama.cpp failed with " + std::to_string(code) : errors);
        return TRIO_E_FATAL;
    }
}

} // namespace

// llama.cpp itself treats every batch of more than one row as a prefill. Its threads wait for each other after every
// operation, by spinning. Where operations are short, one core that is busy with something else stalls them all. So a
// narrow step runs on the fewer threads meant for decoding, however many sequences it has rows of.
void trio::attach_threads(trio_context &context, bool is_narrow) {
    const auto &pool = is_narrow ? context.threadpool : context.threadpool_batch;
    const int32_t n_threads = is_narrow ? context.n_threads : context.n_threads_batch;
    ggml_threadpool *native = pool ? pool->native() : nullptr;
    llama_attach_threadpool(context.native.get(), native, native);
    llama_set_n_threads(context.native.get(), n_threads, n_threads);
    context.is_narrow = is_narrow;
}

extern "C" {

int32_t trio_step(trio_context *context, const trio_batch *batch, const trio_sample_request *request,
                  trio_sample_result *result) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(batch, "batch");
        check(!context->model->no_alloc, "the model has no weights");
        ++context->step;
        const bool is_narrow = check_batch(*context, *batch);
        check_request(*context, *batch, request, result);
        context->begin_batch(batch->number);
        if (context->is_aborted()) {
            set_last_error("aborted");
            return TRIO_ABORTED;
        }
        context->has_embeddings = false;
        context->outputs.clear();
        const int32_t code = finish_decode(*context, *batch, decode(*context, *batch, is_narrow));
        if (code != TRIO_OK) return code;
        context->outputs.assign(batch->outputs, batch->outputs + batch->n_rows);
        context->has_embeddings = batch->embeddings != 0;
        const int32_t n_samples = request != nullptr ? request->n_samples : 0;
        if (n_samples > 0) sample(*context, *request, *result);
        return TRIO_OK;
    });
}

int32_t trio_encode(trio_context *context, const trio_batch *batch) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(batch, "batch");
        check(!context->model->no_alloc, "the model has no weights");
        const bool is_narrow = check_encoder_batch(*context, *batch);
        context->begin_batch(batch->number);
        if (context->is_aborted()) {
            set_last_error("aborted");
            return TRIO_ABORTED;
        }
        context->has_embeddings = false;
        context->outputs.clear();
        const int32_t code = finish_decode(*context, *batch, encode(*context, *batch, is_narrow));
        if (code != TRIO_OK) return code;
        std::fill(context->has_encoder_tokens.begin(), context->has_encoder_tokens.end(), int8_t(0));
        for (int32_t row = 0; row < batch->n_rows; ++row)
            context->has_encoder_tokens[size_t(batch->seqs[row])] = 1;
        return TRIO_OK;
    });
}

int32_t trio_score(trio_context *context, int32_t row, int32_t token, int32_t n_top, float *logprob,
                   int32_t *top_tokens, float *top_logprobs) {
    return guard([&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(logprob, "logprob");
        check(!context->has_embeddings && row >= 0 && size_t(row) < context->outputs.size() &&
                  context->outputs[size_t(row)] == 1,
              "the row has no logits");
        const int32_t n_vocab = context->model->info.n_vocab;
        context->model->check_token(token);
        check(n_top >= 0 && n_top <= n_vocab, "n_top is out of range");
        check(n_top == 0 || (top_tokens != nullptr && top_logprobs != nullptr), "the top arrays are NULL");
        const float *logits = llama_get_logits_ith(context->native.get(), row);
        if (logits == nullptr || !are_numbers(logits, n_vocab))
            throw Failure(TRIO_E_NATIVE, "the model computed logits that are not numbers");
        trio_sampled scored{};
        scored.token = token;
        report_probabilities(logits, n_vocab, n_top, context->scratch.front().candidates.data(), scored, top_tokens,
                             top_logprobs);
        *logprob = scored.logprob;
        return scored.n_top;
    });
}

int32_t trio_embedding(trio_context *context, int32_t seq, int32_t row, float *values, int32_t size) {
    return guard([&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(values, "values");
        check(context->has_embeddings, "the last step computed no embeddings");
        const float *embedding = nullptr;
        if (context->info.pooling_type == LLAMA_POOLING_TYPE_NONE) {
            check(row >= 0 && size_t(row) < context->outputs.size() && context->outputs[size_t(row)] == 1,
                  "the row has no embedding");
            embedding = llama_get_embeddings_ith(context->native.get(), row);
        } else {
            context->check_seq(seq);
            embedding = llama_get_embeddings_seq(context->native.get(), seq);
        }
        check(embedding != nullptr, "the sequence has no embedding");
        const int32_t n = context->info.n_embd_out;
        for (int32_t i = 0; i < n; ++i) {
            if (!std::isfinite(embedding[i]))
                throw Failure(TRIO_E_NATIVE, "the model computed an embedding that is not numbers");
        }
        std::copy_n(embedding, std::min(n, std::max(size, 0)), values);
        return n;
    });
}

void trio_abort(trio_context *context, uint64_t number) {
    if (context != nullptr) context->aborted_number.store(number, std::memory_order_relaxed);
}

} // extern "C"
