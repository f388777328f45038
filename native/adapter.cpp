// LoRA adapters: opening one includes a trial on a few tokens.

#include "internal.h"

#include <algorithm>
#include <cmath>
#include <fstream>

using namespace trio;

namespace {

// Reads the whole file into the system's cache, before a lock is taken that others wait for.
void read_through(const char *path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> buffer(size_t(1) << 20);
    while (file.read(buffer.data(), std::streamsize(buffer.size()))) {
    }
}

// Decodes a few tokens in a context of its own, on this thread alone. An adapter that does not fit the model fails an
// assert when a graph is built or computed: that happens here, where it is caught, instead of in a batch of all
// clients.
void try_adapter(trio_model &model, llama_adapter_lora *adapter) {
    constexpr int32_t N_TOKENS = 4; // several rows take another code path than one
    ExpectWarnings expected;        // about such a short context
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_batch = params.n_ubatch = N_TOKENS;
    params.n_threads = params.n_threads_batch = 1;
    params.pooling_type = LLAMA_POOLING_TYPE_NONE;
    params.flash_attn_type = model.info.has_encoder ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
    params.no_perf = true;
    params.kv_unified = true;
    params.embeddings = !model.info.has_decoder;
    const std::unique_ptr<llama_context, ContextDeleter> context(llama_init_from_model(model.native, params),
                                                                 ContextDeleter{&model});
    if (!context) throw Failure(TRIO_E_NATIVE, "no context to try the adapter in: " + Scope::errors());
    params.embeddings = params.embeddings || llama_get_memory(context.get()) == nullptr;
    llama_set_embeddings(context.get(), params.embeddings);

    float scale = 1.0f;
    llama_set_adapters_lora(context.get(), &adapter, 1, &scale);
    std::vector<llama_token> tokens(N_TOKENS, std::max(model.info.token_bos, 0));
    const llama_batch batch = llama_batch_get_one(tokens.data(), N_TOKENS);
    int32_t code = 0;
    if (model.info.has_encoder && model.info.has_decoder) code = llama_encode(context.get(), batch);
    if (code == 0) code = llama_decode(context.get(), batch);
    if (code != 0) throw Failure(TRIO_E_LOAD, "the model cannot be used with the adapter: " + Scope::errors());
    const float *values = params.embeddings ? llama_get_embeddings_ith(context.get(), N_TOKENS - 1)
                                            : llama_get_logits_ith(context.get(), N_TOKENS - 1);
    const int32_t n = params.embeddings ? llama_model_n_embd_out(model.native) : model.info.n_vocab;
    if (values == nullptr || !std::all_of(values, values + n, [](float value) { return std::isfinite(value); })) {
        throw Failure(TRIO_E_LOAD, "with the adapter, the model does not compute numbers");
    }
}

} // namespace

extern "C" {

int32_t trio_adapter_open(trio_model *model, const char *path, trio_adapter **adapter) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(path, "path");
        check_pointer(adapter, "adapter");
        *adapter = nullptr;
        check(!model->vocab_only && !model->no_alloc, "the model has no weights to adapt");
        read_through(path);
        auto opened = std::make_unique<trio_adapter>();
        {
            std::lock_guard<std::mutex> lock(model->adapters_mutex);
            llama_adapter_lora *native = llama_adapter_lora_init(model->native, path);
            if (native == nullptr) {
                const std::string errors = Scope::errors();
                throw Failure(TRIO_E_LOAD, errors.empty() ? "llama.cpp could not load the adapter" : errors);
            }
            opened->lora = std::make_shared<Lora>(model, native);
            if (llama_adapter_get_alora_n_invocation_tokens(native) > 0) {
                throw Failure(TRIO_E_LOAD, "an adapter that tokens of the prompt switch on (aLoRA) is not supported");
            }
            try {
                try_adapter(*model, native);
            } catch (const Assert &failure) {
                throw Failure(TRIO_E_LOAD, std::string("the adapter does not fit the model: ") + failure.what());
            }
        }
        *adapter = opened.release();
        return TRIO_OK;
    });
}

void trio_adapter_free(trio_adapter *adapter) {
    guard([&] {
        delete adapter;
        return TRIO_OK;
    });
}

} // extern "C"
