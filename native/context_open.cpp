// Contexts: opening and freeing them, their adapters, and the memory that they take on devices.

#include "context.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-ext.h"

using namespace trio;

namespace {

// How long ggml's threads spin for the next graph before they sleep, from 0 to 100. The default, 50, keeps every core
// busy for tens of milliseconds after each step, just when the event loop has the step's tokens to deliver. 1 lasts for
// the gap between two steps. With 0, waking them takes a few percent of the shortest steps.
constexpr uint32_t THREADPOOL_POLL = 1;

bool on_abort_query(void *data) {
    const auto *context = static_cast<const trio_context *>(data);
    return context->abort_armed && context->is_aborted();
}

// llama.cpp's callback for each node of a graph. Devices do not check whether a batch is aborted. So the graph of a
// wide batch is computed layer by layer, and this checks in between: waiting for each layer costs little beside the
// layer.
bool on_node(ggml_tensor *node, bool ask, void *data) {
    const auto *context = static_cast<const trio_context *>(data);
    if (ask) return context->abort_armed && !context->is_narrow && std::strncmp(node->name, "l_out", 5) == 0;
    if (context->is_aborted()) throw BatchAborted();
    return true;
}

// Whether some layers have a sliding window, in a memory that could otherwise be cut anywhere.
bool has_windows(const trio_model &model) {
    return model.info.n_swa > 0 && !model.info.is_recurrent && !model.info.is_hybrid;
}

bool can_have_shadows(const trio_model &model, const trio_context_params &params) {
    // These architectures have a cache of their own kind, which takes no row for two sequences.
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
        // Not with an rpc-server: every part of a graph would be sent to it again.
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
        native.n_batch = std::max(native.n_batch, native.n_seq_max); // llama.cpp reserves an output for every sequence
        native.n_ubatch = std::max(native.n_ubatch, native.n_seq_max);
    }
    if (is_encoder_decoder(*context->model.get())) {
        // The decoder needs the encoder's output unpooled. Flash attention cannot add biases of positions, and with it
        // the cache would be transposed in every step.
        native.pooling_type = LLAMA_POOLING_TYPE_NONE;
        native.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    return native;
}

// Whether positions are a learned table. A worker thread would read a position that the table does not have from beyond
// it, and nothing would catch that.
bool has_position_table(const trio_model &model, bool has_memory) {
    const bool is_encoder = !has_memory;
    const bool has_rope = llama_model_rope_type(model.native) != LLAMA_ROPE_TYPE_NONE;
    const bool has_bias = is_encoder_decoder(model); // that depends on the distance alone
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

trio_context_info describe(const trio_context &context, const trio_context_params &params) {
    llama_context *native = context.native.get();
    const trio_model &model = *context.model.get();
    trio_context_info info{};
    info.n_ctx = int32_t(llama_n_ctx(native));
    info.n_batch = int32_t(llama_n_batch(native));
    info.n_ubatch = int32_t(llama_n_ubatch(native));
    info.n_seq_max = int32_t(params.n_seq_max);
    info.n_threads = context.n_threads;
    info.pooling_type = int32_t(llama_pooling_type(native));
    info.has_memory = context.memory != nullptr;
    // With a table, the position was added to what a cell holds and cannot be taken out again. llama.cpp does not
    // refuse to shift such cells.
    const bool has_table = has_position_table(model, info.has_memory != 0);
    info.can_shift = context.memory != nullptr && llama_memory_can_shift(context.memory) && !has_table;
    info.causal = llama_get_causal_attn(native);
    info.n_positions = has_table ? std::min(info.n_ctx, model.info.n_ctx_train) : info.n_ctx;
    info.n_embd_out = info.pooling_type == LLAMA_POOLING_TYPE_RANK ? int32_t(llama_model_n_cls_out(model.native))
                                                                   : llama_model_n_embd_out(model.native);
    info.has_encoder = is_encoder_decoder(model);
    info.n_embd_in = info.has_memory && !info.has_encoder ? llama_model_n_embd_inp(model.native) : 0;
    info.n_input_positions = n_input_positions(model);
    info.decoder_start = info.has_encoder ? decoder_start(model) : -1;
    return info;
}

void find_model_devices(trio_context &context) {
    const llama_model *model = context.model->native;
    for (int32_t i = 0; i < llama_model_n_devices(model); ++i) {
        context.has_devices = true;
        (is_remote(llama_model_get_device(model, i)) ? context.has_remote : context.has_local) = true;
    }
}

void start_threads(trio_context &context, const trio_context_params &params) {
    context.n_threads = params.n_threads;
    context.n_threads_batch = params.n_threads_batch;
    if (params.n_threads > 1) context.threadpool = std::make_unique<Threadpool>(params.n_threads);
    if (params.n_threads_batch > 1) context.threadpool_batch = std::make_unique<Threadpool>(params.n_threads_batch);
    attach_threads(context, true);
}

// Makes room for the largest batch, so that a step allocates nothing.
void reserve_rows(trio_context &context) {
    const auto n_batch = size_t(context.info.n_batch);
    const int32_t n_seqs = context.has_shadows ? 2 : 1; // of each row
    context.tokens.resize(n_batch);
    context.positions.resize(n_batch * size_t(context.info.n_input_positions));
    context.seqs.resize(n_batch * size_t(n_seqs));
    context.native_outputs.resize(n_batch);
    context.outputs.reserve(n_batch);
    context.n_seq_ids.assign(n_batch, n_seqs);
    context.seq_pointers.resize(n_batch + 1, nullptr); // llama.cpp's own batches end with NULL
    for (size_t row = 0; row < n_batch; ++row)
        context.seq_pointers[row] = &context.seqs[row * size_t(n_seqs)];
    context.last_positions.resize(size_t(context.info.n_seq_max));
    context.has_encoder_tokens.resize(size_t(context.info.n_seq_max));
}

} // namespace

// The functions come from the CPU plugin, which is not linked.
Threadpool::Threadpool(int32_t n_threads) {
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

Threadpool::~Threadpool() {
    if (native_ != nullptr) free_(native_);
}

// llama.cpp waits for the devices of a context in its destructor, where nothing can be caught. So the shim waits
// first. Each rpc-server that is lost makes that throw once. If it still throws after one attempt for each device, the
// context can never be freed.
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

extern "C" {

int32_t trio_context_open(trio_model *model, const trio_context_params *params, trio_context **context) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(params, "params");
        *check_pointer(context, "context") = nullptr;
        check_context_params(*model, *params);

        auto opened = std::make_unique<trio_context>(model);
        opened->has_shadows = can_have_shadows(*model, *params);
        find_model_devices(*opened);
        {
            // One KV cache for all sequences may hold more than the model's context, and any model may give embeddings.
            ExpectWarnings expected;
            std::lock_guard<std::mutex> planning(model->adapters_mutex);
            opened->native.reset(llama_init_from_model(model->native, native_params(*params, opened.get())));
        }
        if (!opened->native) {
            const std::string errors = Scope::errors();
            const int32_t code = Scope::assert_fired() ? TRIO_E_ASSERT : TRIO_E_NATIVE;
            throw Failure(code, errors.empty() ? "llama.cpp could not create the context" : errors);
        }
        start_threads(*opened, *params);
        opened->memory = llama_get_memory(opened->native.get());
        opened->loses_cells = opened->memory != nullptr && has_windows(*model) && !opened->has_shadows;
        opened->is_recurrent = model->info.is_recurrent || model->info.is_hybrid;
        opened->info = describe(*opened, *params);
        reserve_rows(*opened);
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
            const bool is_host = ggml_backend_buft_is_host(type);
            const int32_t device = is_host ? -1 : device_number(ggml_backend_buft_get_device(type));
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
        context->adapters.swap(loras); // the old ones are freed now, unless another context has them set
        return TRIO_OK;
    });
}

} // extern "C"
