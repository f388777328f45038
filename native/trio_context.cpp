// Contexts: the KV cache, and the step that decodes a batch and samples from it.

#include "crew.h"
#include "trio_internal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-ext.h"

using namespace trio;

namespace {

constexpr int32_t MAX_THREADS = 512; // beyond about this, creating threads fails, which ggml answers with an abort
constexpr uint32_t MAX_BATCH = 1 << 16;
constexpr int32_t FEW_ROWS = 16; // up to here an operation costs about as much as waiting for all threads
constexpr int32_t N_POOLING_TYPES = 5;

// Logits in one step from which on it is quicker to wake a few threads than to go through them alone.
constexpr int64_t MUCH_TO_SAMPLE = 1 << 18;
constexpr int32_t MAX_SAMPLERS_AT_ONCE = 8;

// How long ggml's threads spin for the next graph before they sleep, from 0 to 100. Its default, 50, keeps every core
// busy for tens of milliseconds after each step, just when the event loop has the step's tokens to deliver. 1 lasts for
// the gap between two steps; with 0, waking them takes a few percent of the shortest steps.
constexpr uint32_t THREADPOOL_POLL = 1;

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

// Threads that live as long as their context; without them ggml makes new ones for every graph. The functions come from
// the CPU plugin, which is not linked.
class Threadpool {
public:
    explicit Threadpool(int32_t n_threads) {
        ggml_backend_reg_t cpu = ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
        const auto make = reinterpret_cast<decltype(ggml_threadpool_new) *>(
            ggml_backend_reg_get_proc_address(cpu, "ggml_threadpool_new"));
        free_ = reinterpret_cast<decltype(ggml_threadpool_free) *>(
            ggml_backend_reg_get_proc_address(cpu, "ggml_threadpool_free"));
        if (make == nullptr || free_ == nullptr) return;
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        params.poll = THREADPOOL_POLL;
        params.paused = true; // until the first graph
        native_ = make(&params);
    }
    ~Threadpool() {
        if (native_ != nullptr) free_(native_);
    }
    Threadpool(const Threadpool &) = delete;
    Threadpool &operator=(const Threadpool &) = delete;
    ggml_threadpool *native() const { return native_; }

private:
    ggml_threadpool *native_ = nullptr;
    decltype(ggml_threadpool_free) *free_ = nullptr;
};

// While alive, rows see later ones of their sequence too.
class BothWays {
public:
    BothWays(llama_context *context, bool wanted) : context_(context), wanted_(wanted && llama_get_causal_attn(context)) {
        if (wanted_) llama_set_causal_attn(context_, false);
    }
    ~BothWays() {
        if (wanted_) llama_set_causal_attn(context_, true);
    }
    BothWays(const BothWays &) = delete;
    BothWays &operator=(const BothWays &) = delete;

private:
    llama_context *context_;
    bool wanted_;
};

} // namespace

// llama.cpp waits for the devices of a context in its destructor, where nothing can be caught. So that is tried before.
// Of the rpc-servers each that is gone throws once; whoever throws again can never be freed.
void ContextDeleter::operator()(llama_context *context) const noexcept {
    Scope scope;
    for (int32_t n = llama_model_n_devices(model->native); n >= 0 && !model->devices_failed; --n) {
        try {
            llama_synchronize(context);
        } catch (...) {
            continue;
        }
        const ExpectWarnings expected; // of buffers that have grown
        llama_free(context);
        return;
    }
    model->devices_failed = true;
}

struct trio_context {
    explicit trio_context(trio_model *owner) : model(owner) { scratch.emplace_back(owner->info.n_vocab); }

    ModelReference model;
    // Before `native`, which uses them until it is freed.
    std::unique_ptr<Threadpool> threadpool, threadpool_batch; // for narrow steps, and for wide ones
    int32_t n_threads = 1, n_threads_batch = 1;
    bool is_narrow = false; // which of the two is attached
    std::atomic<uint64_t> aborted_number{0};
    uint64_t running_number = 0; // of the batch that is being decoded
    bool abort_armed = true;     // false while an interrupted graph would leave the KV cache wrong
    std::vector<std::shared_ptr<Lora>> adapters; // that are set
    bool plan_pending = false;                   // they were changed; the next batch plans its graphs anew
    std::unique_ptr<llama_context, ContextDeleter> native{nullptr, ContextDeleter{model.get()}};
    llama_memory_t memory = nullptr;
    trio_context_info info{};
    int32_t n_ubatch = 0;
    bool has_devices = false; // besides the CPU
    bool has_remote = false;  // one of them belongs to an rpc-server
    bool has_local = false;   // one of them does not
    bool is_recurrent = false; // state that cannot be taken back to an earlier position
    // llama.cpp gives a cell that only one sequence has, and that is out of its sliding window, to others, even where the
    // cache has room for all: what is then cut off behind it would leave the rest incomplete. So each sequence has a
    // shadow, which has all of its cells too and is never looked at.
    bool has_shadows = false;
    bool loses_cells = false; // there are no shadows, where they are needed

    char poison[512] = "";      // why nothing but free is possible any more; no string, as memory may be what ran out
    bool embeddings = false;    // what llama.cpp was last told to compute
    bool has_vectors = false;   // the last step computed vectors
    bool shift_pending = false; // trio_seq_add was called; the next decode carries it out
    uint64_t step = 0;
    std::vector<int8_t> outputs;         // of the last batch
    std::vector<int32_t> last_positions; // of each sequence in the batch being checked; -1: not in it
    std::vector<int8_t> has_source;      // of each sequence: the encoder has read it
    std::vector<int32_t> tokens, positions, n_seq_ids;
    std::vector<llama_seq_id> seqs;
    std::vector<llama_seq_id *> seq_pointers;
    std::vector<int8_t> native_outputs;
    std::unique_ptr<Crew> crew; // samples, where there is much to sample
    std::vector<Scratch> scratch; // of each of its members
    std::vector<const float *> logits;

    bool is_aborted() const {
        return running_number != 0 && aborted_number.load(std::memory_order_relaxed) == running_number;
    }
    void check_alive() const {
        if (poison[0] != '\0') throw Failure(TRIO_E_ASSERT, std::string("the context is poisoned: ") + poison);
    }
    void check_seq(int32_t seq) const {
        if (seq < 0 || seq >= info.n_seq_max) throw Refused("sequence " + std::to_string(seq) + " does not exist");
    }
    int32_t shadow(int32_t seq) const { return seq + info.n_seq_max; }
    int32_t last_position(int32_t seq) const { return llama_memory_seq_pos_max(memory, seq); }
    bool remove(int32_t seq, int32_t start, int32_t end) {
        if (has_shadows) llama_memory_seq_rm(memory, shadow(seq), start, end);
        return llama_memory_seq_rm(memory, seq, start, end);
    }
    void check_range(int32_t start, int32_t end) const {
        check(start >= 0 && start <= info.n_ctx, "start is out of range");
        check(end == -1 || (end >= start && end <= info.n_ctx), "end is out of range");
    }
};

namespace {

bool on_abort_query(void *data) {
    const auto *context = static_cast<const trio_context *>(data);
    return context->abort_armed && context->is_aborted();
}

struct Stopped {}; // thrown through llama.cpp by on_node()

// Devices do not look whether a batch is wanted. So the graph of a wide one is computed layer by layer, and we look in
// between: the wait for each layer costs little beside the layer.
bool on_node(ggml_tensor *node, bool asks, void *data) {
    const auto *context = static_cast<const trio_context *>(data);
    if (asks) return context->abort_armed && !context->is_narrow && std::strncmp(node->name, "l_out", 5) == 0;
    if (context->is_aborted()) throw Stopped();
    return true;
}

// For calls into llama.cpp that change the context: whatever is thrown in the middle of one leaves it in a state nobody
// knows.
template <class Body> int32_t guard_context(trio_context *context, Body &&body) noexcept {
    Scope scope;
    try {
        return body();
    } catch (...) {
        const int32_t code = translate_exception();
        if (code != TRIO_E_INVALID && context != nullptr && context->poison[0] == '\0') {
            std::strcpy(context->poison, "an earlier failure");
            trio_last_error(context->poison, sizeof context->poison);
            if (context->has_local) context->model->devices_failed = true;
        }
        return code;
    }
}

bool is_encoder_decoder(const trio_model &model) {
    return model.info.has_encoder && model.info.has_decoder;
}

// Whether some layers see a window only, of a memory that could be cut anywhere.
bool has_windows(const trio_model &model) {
    return model.info.n_swa > 0 && !model.info.is_recurrent && !model.info.is_hybrid;
}

bool can_have_shadows(const trio_model &model, const trio_context_params &params) {
    // These have caches of their own kind, which take no row for two sequences.
    const bool is_usual = model.architecture != "deepseek4" && model.architecture != "glm5-next";
    return has_windows(model) && is_usual && params.swa_full && 2 * params.n_seq_max <= llama_max_parallel_sequences();
}

llama_context_params native_params(const trio_context_params &params, trio_context *context) {
    llama_context_params native = llama_context_default_params();
    native.n_ctx = params.n_ctx;
    native.n_batch = params.n_batch;
    native.n_ubatch = params.n_ubatch;
    native.n_seq_max = params.n_seq_max;
    native.n_threads = params.n_threads;
    native.n_threads_batch = params.n_threads_batch;
    native.pooling_type = static_cast<enum llama_pooling_type>(params.pooling_type);
    native.flash_attn_type = llama_flash_attn_type(params.flash_attention);
    native.rope_freq_base = params.rope_freq_base;
    native.rope_freq_scale = params.rope_freq_scale;
    native.type_k = ggml_type(params.type_k);
    native.type_v = ggml_type(params.type_v);
    native.abort_callback = on_abort_query;
    native.abort_callback_data = context;
    if (context->has_devices && !context->has_remote) {
        // An rpc-server would be sent every graph anew.
        native.cb_eval = on_node;
        native.cb_eval_user_data = context;
    }
    native.embeddings = false;
    native.offload_kqv = params.offload_kqv != 0;
    native.no_perf = true;
    native.swa_full = params.swa_full != 0;
    native.kv_unified = true;
    if (context->has_shadows) {
        native.n_seq_max *= 2;
        native.n_batch = std::max(native.n_batch, native.n_seq_max); // an output of every sequence is planned for
        native.n_ubatch = std::max(native.n_ubatch, native.n_seq_max);
    }
    if (is_encoder_decoder(*context->model.get())) {
        // The decoder is handed what is not pooled. Biases of positions are not for flash attention, and the cache for
        // it would be turned around in every step.
        native.pooling_type = LLAMA_POOLING_TYPE_NONE;
        native.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    return native;
}

void validate(const trio_model &model, const trio_context_params &params) {
    check(!model.vocab_only, "the model was loaded without its weights");
    // What drafts for another model is fed by that model's layers.
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

// ---- sampling ------------------------------------------------------------------------------------------------------

// Log-probabilities of the model itself: the chosen token's, and the n most probable alternatives. `best` is scratch.
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

// One sequence's failure is its own: whatever is thrown here becomes this sample's status, and its piece the message.
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
            report_probabilities(logits, model.info.n_vocab, sampler.n_top, scratch.candidates.data(),
                                 sampled, result.top_tokens + offset, result.top_logprobs + offset);
        }
        if (!model.info.has_vocab) return TRIO_OK;
        sampled.is_end = llama_vocab_is_eog(model.vocab, sampled.token);
        if (sampled.is_end) return TRIO_OK;
        const int32_t n = llama_token_to_piece(model.vocab, sampled.token, piece, stride, 0, true);
        if (n < 0) throw Failure(TRIO_E_NATIVE, "the pieces buffer is too small");
        sampled.piece_length = n;
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
    for (int32_t index = 0; index < n; ++index) // may wait, and is for one thread only
        context.logits[size_t(index)] = llama_get_logits_ith(context.native.get(), request.rows[index]);
    if (n < 2 || int64_t(n) * context.model->info.n_vocab < MUCH_TO_SAMPLE || context.n_threads_batch < 2) {
        for (int32_t index = 0; index < n; ++index)
            sample_one(context, index, request, context.scratch.front(), result);
        return;
    }
    if (!context.crew) {
        context.crew = std::make_unique<Crew>(std::min(context.n_threads_batch, MAX_SAMPLERS_AT_ONCE) - 1);
        while (context.scratch.size() < context.crew->size())
            context.scratch.emplace_back(context.model->info.n_vocab);
    }
    context.crew->run(n, [&](int32_t index, size_t member) {
        sample_one(context, index, request, context.scratch[member], result);
    });
}

// ---- decoding ------------------------------------------------------------------------------------------------------

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
    // One that is not a number would spread from its cell to sequences that do not even see it.
    const size_t n = size_t(batch.n_rows) * size_t(info.n_embd_in);
    check(std::all_of(batch.inputs, batch.inputs + n, [](float value) { return std::isfinite(value); }),
          "an input is not a finite number");
}

// Tells whether the batch is narrow: few rows, and none that are part of a prompt.
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
            check(position >= last_position, "positions of a sequence must not go back");
        } else { // llama.cpp itself would take the same position twice
            check(last_position < 0 || position == last_position + 1, "positions of a sequence must follow one another");
        }
        is_narrow = is_narrow && last_position < 0;
        last_position = position;
    }
    return is_narrow;
}

bool check_batch(trio_context &context, const trio_batch &batch) {
    const trio_context_info &info = context.info;
    check(batch.n_rows >= 1 && batch.n_rows <= info.n_batch, "n_rows must be between 1 and n_batch");
    check((info.has_memory && info.causal && !batch.both_ways) || batch.n_rows <= context.n_ubatch,
          "attention looks both ways: n_rows must not be more than n_ubatch");
    check(info.has_memory || batch.embeddings, "the model computes vectors only");
    check(!info.has_encoder || !batch.embeddings, "an encoder-decoder model computes no vectors");
    check_pointer(batch.outputs, "outputs");
    const bool is_narrow = check_rows(context, batch);
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        check(batch.outputs[row] == 0 || batch.outputs[row] == 1, "outputs must be 0 or 1");
        check(!info.has_encoder || context.has_source[size_t(batch.seqs[row])],
              "the encoder has read nothing for a sequence");
    }
    return is_narrow;
}

bool check_source(trio_context &context, const trio_batch &batch) {
    check(context.info.has_encoder != 0, "the model has no encoder beside its decoder");
    check(batch.n_rows >= 1 && batch.n_rows <= context.n_ubatch, "n_rows must be between 1 and n_ubatch");
    check(batch.inputs == nullptr, "an encoder takes tokens only");
    const bool is_narrow = check_rows(context, batch);
    std::fill(context.last_positions.begin(), context.last_positions.end(), -1);
    for (int32_t row = 0; row < batch.n_rows; ++row)
        check(batch.positions[row] == ++context.last_positions[size_t(batch.seqs[row])], "a source begins at position 0");
    return is_narrow;
}

void check_request(trio_context &context, const trio_batch &batch, const trio_sample_request *request,
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

// llama.cpp itself takes every batch of more than one row for a prefill. Its threads wait for each other after every
// operation, by spinning; where the operations are short, one core that is busy with anything else stalls them all. So
// narrow steps, however many sequences they belong to, run on the threads meant for that.
void attach_threads(trio_context &context, bool is_narrow) {
    const auto &pool = is_narrow ? context.threadpool : context.threadpool_batch;
    const int32_t n_threads = is_narrow ? context.n_threads : context.n_threads_batch;
    ggml_threadpool *native = pool ? pool->native() : nullptr;
    llama_attach_threadpool(context.native.get(), native, native);
    llama_set_n_threads(context.native.get(), n_threads, n_threads);
    context.is_narrow = is_narrow;
}

// What llama.cpp is given is a copy: it takes no pointers to what is constant.
llama_batch fill_native(trio_context &context, const trio_batch &batch) {
    const auto n_rows = size_t(batch.n_rows);
    llama_batch native{};
    native.n_tokens = batch.n_rows;
    if (batch.inputs != nullptr) {
        native.embd = const_cast<float *>(batch.inputs); // but these are many, and only read
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

// As llama.cpp does itself where it breaks off. A recurrent state is removed as a whole, later.
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
    // llama.cpp outputs every row of an embeddings batch, and says so on every batch that did not ask for it.
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
    const BothWays both_ways(context.native.get(), batch.both_ways != 0);
    std::unique_lock<std::mutex> planning(context.model->adapters_mutex, std::defer_lock);
    if (context.plan_pending) planning.lock();
    // An interrupted K-shift would renumber positions and leave the keys as they were.
    context.abort_armed = !context.shift_pending;
    int32_t code = 0;
    try {
        code = llama_decode(context.native.get(), native);
    } catch (const Stopped &) {
        forget_rows(context, batch);
        code = 2;
    }
    // Devices have only been told what to do. A step ends when they have done it: or else what goes wrong would show in a
    // later call, and a prompt's batches would queue up, with no way to break them off in between.
    if (code == 0 && context.has_devices) llama_synchronize(context.native.get());
    context.abort_armed = true;
    if (code != -1) context.plan_pending = false;
    if (code == 0 || code == 2 || code < -1) context.shift_pending = false;
    return code;
}

int32_t encode(trio_context &context, const trio_batch &batch, bool is_narrow) {
    const llama_batch native = fill_native(context, batch);
    std::fill_n(context.native_outputs.begin(), size_t(batch.n_rows), int8_t(1));
    // llama.cpp wants them to follow what the decoder holds; an encoder minds distances only.
    for (int32_t row = 0; row < batch.n_rows; ++row)
        native.pos[row] += context.last_position(batch.seqs[row]) + 1;
    if (context.is_narrow != is_narrow) attach_threads(context, is_narrow);
    std::unique_lock<std::mutex> planning(context.model->adapters_mutex, std::defer_lock);
    if (context.plan_pending) planning.lock();
    int32_t code = 0;
    try {
        code = llama_encode(context.native.get(), native);
    } catch (const Stopped &) {
        code = 2;
    }
    if (code == 0 && context.has_devices) llama_synchronize(context.native.get());
    if (code != -1) context.plan_pending = false;
    return code;
}

// A recurrent state has been overwritten by the micro-batch that did not finish: nothing of these sequences is left. Of
// others, llama.cpp removes what was not finished, but only from one sequence of each row.
void forget_unfinished(trio_context &context, const trio_batch &batch) {
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        const int32_t seq = batch.seqs[row];
        if (context.is_recurrent) llama_memory_seq_rm(context.memory, seq, -1, -1);
        if (context.has_shadows) {
            context.remove(seq, std::min(context.last_position(seq), context.last_position(context.shadow(seq))) + 1, -1);
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

// Positions that learned tables do not have would be read from beyond the table by a worker thread, which nothing
// catches.
bool has_position_table(const trio_model &model, bool has_memory) {
    const bool is_encoder = !has_memory;
    const bool has_rope = llama_model_rope_type(model.native) != LLAMA_ROPE_TYPE_NONE;
    const bool has_bias = is_encoder_decoder(model); // by the distance, however far
    return is_encoder || !(has_rope || has_bias || model.info.is_recurrent || model.info.is_hybrid);
}

int32_t n_input_positions(const trio_model &model) {
    const auto type = llama_model_rope_type(model.native);
    return type == LLAMA_ROPE_TYPE_MROPE || type == LLAMA_ROPE_TYPE_IMROPE ? GGML_MROPE_SECTIONS : 1;
}

int32_t decoder_start(const trio_model &model) {
    const int32_t token = llama_model_decoder_start_token(model.native);
    return token >= 0 && token < model.info.n_vocab ? token : std::max(model.info.token_bos, 0);
}

} // namespace

extern "C" {

int32_t trio_context_open(trio_model *model, const trio_context_params *params, trio_context **context) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(params, "params");
        *check_pointer(context, "context") = nullptr;
        validate(*model, *params);

        auto opened = std::make_unique<trio_context>(model);
        opened->has_shadows = can_have_shadows(*model, *params);
        for (int32_t i = 0; i < llama_model_n_devices(model->native); ++i) {
            opened->has_devices = true;
            (is_remote(llama_model_get_device(model->native, i)) ? opened->has_remote : opened->has_local) = true;
        }
        {
            // One KV cache for all sequences may hold more than the model's context, and any model may give vectors.
            ExpectWarnings expected;
            std::lock_guard<std::mutex> planning(model->adapters_mutex);
            opened->native.reset(llama_init_from_model(model->native, native_params(*params, opened.get())));
        }
        if (!opened->native) {
            const std::string errors = Scope::errors();
            const int32_t code = Scope::assert_fired() ? TRIO_E_ASSERT : TRIO_E_NATIVE;
            throw Failure(code, errors.empty() ? "llama.cpp could not create the context" : errors);
        }
        llama_context *native = opened->native.get();
        opened->n_threads = params->n_threads;
        opened->n_threads_batch = params->n_threads_batch;
        if (params->n_threads > 1) opened->threadpool = std::make_unique<Threadpool>(params->n_threads);
        if (params->n_threads_batch > 1) {
            opened->threadpool_batch = std::make_unique<Threadpool>(params->n_threads_batch);
        }
        attach_threads(*opened, true);

        opened->memory = llama_get_memory(native);
        opened->n_ubatch = int32_t(llama_n_ubatch(native));
        opened->loses_cells = opened->memory != nullptr && has_windows(*model) && !opened->has_shadows;
        opened->is_recurrent = model->info.is_recurrent || model->info.is_hybrid;
        trio_context_info &info = opened->info;
        info.n_ctx = int32_t(llama_n_ctx(native));
        info.n_batch = int32_t(llama_n_batch(native));
        info.n_ubatch = opened->n_ubatch;
        info.n_seq_max = int32_t(params->n_seq_max);
        info.n_threads = opened->n_threads;
        info.pooling_type = int32_t(llama_pooling_type(native));
        info.has_memory = opened->memory != nullptr;
        // llama.cpp would renumber cells whose position was added to what they hold, and cannot be taken out of it again.
        const bool has_table = has_position_table(*model, info.has_memory != 0);
        info.can_shift = opened->memory != nullptr && llama_memory_can_shift(opened->memory) && !has_table;
        info.causal = llama_get_causal_attn(native);
        info.n_positions = has_table ? std::min(info.n_ctx, model->info.n_ctx_train) : info.n_ctx;
        info.n_embd_out = info.pooling_type == LLAMA_POOLING_TYPE_RANK ? int32_t(llama_model_n_cls_out(model->native))
                                                                       : llama_model_n_embd_out(model->native);
        info.has_encoder = is_encoder_decoder(*model);
        info.n_embd_in = info.has_memory && !info.has_encoder ? llama_model_n_embd_inp(model->native) : 0;
        info.n_input_positions = n_input_positions(*model);
        info.decoder_start = info.has_encoder ? decoder_start(*model) : -1;

        const auto n_batch = size_t(info.n_batch);
        const int32_t n_seqs = opened->has_shadows ? 2 : 1; // of each row
        opened->tokens.resize(n_batch);
        opened->positions.resize(n_batch * size_t(info.n_input_positions));
        opened->seqs.resize(n_batch * size_t(n_seqs));
        opened->native_outputs.resize(n_batch);
        opened->outputs.reserve(n_batch);
        opened->n_seq_ids.assign(n_batch, n_seqs);
        opened->seq_pointers.resize(n_batch + 1, nullptr); // llama.cpp's own batches end with NULL
        for (size_t row = 0; row < n_batch; ++row)
            opened->seq_pointers[row] = &opened->seqs[row * size_t(n_seqs)];
        opened->last_positions.resize(size_t(info.n_seq_max));
        opened->has_source.resize(size_t(info.n_seq_max));
        *context = opened.release();
        return TRIO_OK;
    });
}

int32_t trio_context_memory(const trio_context *context, trio_memory *memory, int32_t size) {
    return guard([&] {
        check_pointer(context, "context");
        check(size >= 0 && (memory != nullptr || size == 0), "memory is NULL");
        std::map<int32_t, trio_memory> places;
        for (const auto &[type, use] : llama_get_memory_breakdown(context->native.get())) {
            const int32_t device = ggml_backend_buft_is_host(type) ? -1 : device_number(ggml_backend_buft_get_device(type));
            trio_memory &place = places[device];
            place.device = device;
            place.model += use.model;
            place.context += use.context;
            place.compute += use.compute;
        }
        int32_t n = 0;
        for (const auto &place : places) {
            if (n < size) memory[n] = place.second;
            ++n;
        }
        return n;
    });
}

void trio_context_free(trio_context *context) {
    guard([&] {
        delete context;
        return TRIO_OK;
    });
}

int32_t trio_context_get_info(const trio_context *context, trio_context_info *info) {
    return guard([&] {
        *check_pointer(info, "info") = check_pointer(context, "context")->info;
        return TRIO_OK;
    });
}

int32_t trio_context_set_adapters(trio_context *context, trio_adapter *const *adapters, const float *scales,
                                  int32_t n_adapters) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        check(n_adapters >= 0, "n_adapters is negative");
        std::vector<std::shared_ptr<Lora>> loras;
        std::vector<llama_adapter_lora *> native;
        std::vector<float> native_scales;
        for (int32_t i = 0; i < n_adapters; ++i) {
            const auto &lora = check_pointer(check_pointer(adapters, "adapters")[i], "an adapter")->lora;
            check(lora->model() == context->model.get(), "an adapter belongs to another model");
            check(std::find(loras.begin(), loras.end(), lora) == loras.end(), "an adapter is named twice");
            loras.push_back(lora);
            native.push_back(lora->native());
            native_scales.push_back(check_pointer(scales, "scales")[i]);
            check(std::isfinite(native_scales.back()), "a scale is not finite");
        }
        const int32_t code =
            llama_set_adapters_lora(context->native.get(), native.data(), native.size(), native_scales.data());
        if (code != 0) throw Failure(TRIO_E_NATIVE, "llama.cpp refused the adapters");
        context->plan_pending = true;
        context->adapters.swap(loras); // freed only now are those that nobody else needs
        return TRIO_OK;
    });
}

void trio_abort(trio_context *context, uint64_t number) {
    if (context != nullptr) context->aborted_number.store(number, std::memory_order_relaxed);
}

int32_t trio_seq_remove(trio_context *context, int32_t seq, int32_t start, int32_t end) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        context->check_range(start, end);
        if (!context->info.has_memory || start == end) return 1;
        if (context->loses_cells && start > 0 && start <= context->last_position(seq)) return 0;
        return int32_t(context->remove(seq, start, end));
    });
}

int32_t trio_seq_copy(trio_context *context, int32_t source, int32_t target, int32_t start, int32_t end) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(source);
        context->check_seq(target);
        context->check_range(start, end);
        check(context->info.has_memory != 0, "nothing is kept between steps");
        check(source != target, "source and target are the same sequence");
        check(!(context->is_recurrent || context->loses_cells) ||
                  (start == 0 && (end == -1 || end > context->last_position(source))),
              "this kind of memory can only be copied whole");
        if (start == end) return TRIO_OK;
        llama_memory_seq_cp(context->memory, source, target, start, end);
        if (context->has_shadows) {
            llama_memory_seq_cp(context->memory, context->shadow(source), context->shadow(target), start, end);
        }
        return TRIO_OK;
    });
}

int32_t trio_seq_add(trio_context *context, int32_t seq, int32_t start, int32_t end, int32_t delta) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        context->check_range(start, end);
        check(context->info.can_shift != 0, "positions cannot be renumbered in this kind of memory");
        const int32_t n_ctx = context->info.n_ctx;
        check(delta >= -n_ctx && delta <= n_ctx, "delta is out of range");
        check(start + delta >= 0 && (end == -1 ? n_ctx : end) + std::max(delta, 0) <= n_ctx,
              "renumbered positions would be out of range");
        if (start != end && delta != 0) {
            llama_memory_seq_add(context->memory, seq, start, end, delta);
            context->shift_pending = true;
        }
        return TRIO_OK;
    });
}

int32_t trio_seq_range(const trio_context *context, int32_t seq, int32_t *first, int32_t *last) {
    return guard([&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        check_pointer(first, "first");
        check_pointer(last, "last");
        *first = context->info.has_memory ? llama_memory_seq_pos_min(context->memory, seq) : -1;
        *last = context->info.has_memory ? llama_memory_seq_pos_max(context->memory, seq) : -1;
        return TRIO_OK;
    });
}

int32_t trio_step(trio_context *context, const trio_batch *batch, const trio_sample_request *request,
                  trio_sample_result *result) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(batch, "batch");
        check(!context->model->no_alloc, "the model has no weights");
        ++context->step;
        const bool is_narrow = check_batch(*context, *batch);
        check_request(*context, *batch, request, result);
        context->running_number = batch->number;
        if (context->is_aborted()) {
            set_last_error("aborted");
            return TRIO_ABORTED;
        }
        context->has_vectors = false;
        const int32_t code = finish_decode(*context, *batch, decode(*context, *batch, is_narrow));
        if (code != TRIO_OK) return code;
        context->outputs.assign(batch->outputs, batch->outputs + batch->n_rows);
        context->has_vectors = batch->embeddings != 0;
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
        const bool is_narrow = check_source(*context, *batch);
        context->running_number = batch->number;
        if (context->is_aborted()) {
            set_last_error("aborted");
            return TRIO_ABORTED;
        }
        context->has_vectors = false;
        const int32_t code = finish_decode(*context, *batch, encode(*context, *batch, is_narrow));
        if (code != TRIO_OK) return code;
        std::fill(context->has_source.begin(), context->has_source.end(), int8_t(0));
        for (int32_t row = 0; row < batch->n_rows; ++row)
            context->has_source[size_t(batch->seqs[row])] = 1;
        return TRIO_OK;
    });
}

int32_t trio_embedding(trio_context *context, int32_t seq, int32_t row, float *values, int32_t size) {
    return guard([&] {
        check_pointer(context, "context")->check_alive();
        check_pointer(values, "values");
        check(context->has_vectors, "the last step computed no vectors");
        const float *vector = nullptr;
        if (context->info.pooling_type == LLAMA_POOLING_TYPE_NONE) {
            check(row >= 0 && size_t(row) < context->outputs.size() && context->outputs[size_t(row)] == 1,
                  "the row has no vector");
            vector = llama_get_embeddings_ith(context->native.get(), row);
        } else {
            context->check_seq(seq);
            vector = llama_get_embeddings_seq(context->native.get(), seq);
        }
        check(vector != nullptr, "the sequence has no vector");
        const int32_t n = context->info.n_embd_out;
        for (int32_t i = 0; i < n; ++i) {
            if (!std::isfinite(vector[i]))
                throw Failure(TRIO_E_NATIVE, "the model computed a vector that is not numbers");
        }
        std::copy_n(vector, std::min(n, std::max(size, 0)), values);
        return n;
    });
}

} // extern "C"
