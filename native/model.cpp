// Models and their vocabularies.

#include "internal.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <new>
#include <cmath>
#include <cstring>

using namespace trio;

namespace {

// Bytes of text up to which the caller's own thread tokenises. Longer text goes to a thread with a big stack; starting
// one costs as much as tokenising about this many bytes.
constexpr int32_t MAX_BYTES_ON_CALLER = 2048;

// llama.cpp cuts the text at special tokens, in time that is quadratic in their number. This many take about a second.
constexpr size_t MAX_SPECIAL_TOKENS = 10000;

std::string meta_value(const llama_model *model, const std::string &key) {
    char buffer[256];
    const int32_t n = llama_model_meta_val_str(model, key.c_str(), buffer, sizeof buffer);
    return n < 0 ? std::string() : std::string(buffer);
}

// Copies a key or value to the caller's buffer, cut to size and NUL-terminated. Returns the full length.
template <class Get> int32_t copy_meta(Get get, char *buffer, int32_t size) {
    char none[1];
    const bool have_buffer = buffer != nullptr && size > 0;
    const int32_t n = get(have_buffer ? buffer : none, have_buffer ? size_t(size) : sizeof none);
    if (n < 0) throw Refused("index is out of range");
    return n;
}

trio_model_info describe(const trio_model &model) {
    const llama_model *native = model.native;
    const llama_vocab *vocab = model.vocab;
    trio_model_info info{};
    info.n_vocab = llama_vocab_n_tokens(vocab);
    info.n_ctx_train = llama_model_n_ctx_train(native);
    info.n_embd = llama_model_n_embd(native);
    info.n_layer = llama_model_n_layer(native);
    info.n_head = llama_model_n_head(native);
    info.n_head_kv = llama_model_n_head_kv(native);
    info.n_swa = llama_model_n_swa(native);
    info.has_encoder = llama_model_has_encoder(native);
    info.has_decoder = llama_model_has_decoder(native);
    info.is_recurrent = llama_model_is_recurrent(native);
    info.is_hybrid = llama_model_is_hybrid(native);
    info.is_diffusion = llama_model_is_diffusion(native);
    info.has_vocab = llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE;
    info.add_bos = llama_vocab_get_add_bos(vocab);
    info.add_eos = llama_vocab_get_add_eos(vocab);
    info.add_sep = llama_vocab_get_add_sep(vocab);
    info.token_bos = llama_vocab_bos(vocab);
    info.token_eos = llama_vocab_eos(vocab);
    info.token_sep = llama_vocab_sep(vocab);
    info.token_eot = llama_vocab_eot(vocab);
    info.token_nl = llama_vocab_nl(vocab);
    info.token_fim_pre = llama_vocab_fim_pre(vocab);
    info.token_fim_suf = llama_vocab_fim_suf(vocab);
    info.token_fim_mid = llama_vocab_fim_mid(vocab);
    info.token_fim_rep = llama_vocab_fim_rep(vocab);
    info.token_fim_sep = llama_vocab_fim_sep(vocab);
    info.causal = meta_value(native, model.architecture + ".attention.causal") != "false" && !info.is_diffusion;
    const std::string pooling = meta_value(native, model.architecture + ".pooling_type");
    info.pooling_type = pooling.empty() ? -1 : std::atoi(pooling.c_str());
    info.size = llama_model_size(native);
    info.n_params = llama_model_n_params(native);
    if (info.has_vocab) {
        for (int32_t token = 0; token < info.n_vocab; ++token) {
            const int32_t n = -llama_token_to_piece(vocab, token, nullptr, 0, 0, true);
            info.max_piece = std::max(info.max_piece, n);
        }
    }
    return info;
}

void collect_special_tokens(trio_model &model) {
    if (!model.info.has_vocab) return;
    for (int32_t token = 0; token < model.info.n_vocab; ++token) {
        if (llama_vocab_is_eog(model.vocab, token)) model.end_tokens.push_back(token);
        const int attributes = llama_vocab_get_attr(model.vocab, token);
        const char *text = llama_vocab_get_text(model.vocab, token);
        if (text == nullptr || *text == '\0') continue;
        if (attributes & LLAMA_TOKEN_ATTR_USER_DEFINED) {
            model.user_defined_texts.emplace_back(text);
        } else if (attributes & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) {
            model.control_texts.emplace_back(text);
        }
    }
}

size_t count_texts(const std::vector<std::string> &wanted, const std::string &text, size_t enough) {
    size_t count = 0;
    for (const std::string &special : wanted) {
        for (size_t at = text.find(special); at != std::string::npos; at = text.find(special, at + special.size())) {
            if (++count > enough) return count;
        }
    }
    return count;
}

void check_special_tokens(const trio_model &model, const char *text, int32_t length, bool parse_special) {
    if (size_t(length) <= MAX_SPECIAL_TOKENS) return; // a special token has a byte at least
    const std::string haystack(text, size_t(length));
    size_t count = count_texts(model.user_defined_texts, haystack, MAX_SPECIAL_TOKENS);
    if (parse_special && count <= MAX_SPECIAL_TOKENS) {
        count += count_texts(model.control_texts, haystack, MAX_SPECIAL_TOKENS - count);
    }
    if (count > MAX_SPECIAL_TOKENS) {
        throw Refused("the text names special tokens more than " + std::to_string(MAX_SPECIAL_TOKENS) + " times");
    }
}

llama_load_mode load_mode(const trio_model_params &params) {
    if (params.use_mmap) return params.use_mlock ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MMAP;
    return params.use_mlock ? LLAMA_LOAD_MODE_MLOCK : LLAMA_LOAD_MODE_NONE;
}

// Whether matmul.cpp leaves products to ggml.
bool is_matmul_upstreams() {
    const char *choice = std::getenv("TRIO_RUNNER_MATMUL");
    return choice != nullptr && std::strcmp(choice, "ggml") == 0;
}

// Throws Refused for parameters out of range. `split` and `devices` must live as long as the result is used.
llama_model_params native_params(const trio_model_params &params, trio_load *load, std::vector<float> &split,
                                 std::vector<ggml_backend_dev_t> &devices) {
    check(params.main_gpu >= 0, "main_gpu must not be negative");
    check(params.split_mode >= LLAMA_SPLIT_MODE_NONE && params.split_mode <= LLAMA_SPLIT_MODE_ROW,
          "split_mode must be 0, 1 or 2");
    check(params.n_tensor_split >= 0 && size_t(params.n_tensor_split) <= llama_max_devices(),
          "tensor_split names more devices than llama.cpp knows");
    split.assign(llama_max_devices(), 0.0f);
    for (int32_t i = 0; i < params.n_tensor_split; ++i) {
        split[size_t(i)] = check_pointer(params.tensor_split, "tensor_split")[i];
        check(std::isfinite(split[size_t(i)]) && split[size_t(i)] >= 0.0f, "tensor_split must be finite, 0 or more");
    }
    devices = find_devices(params.devices, params.n_devices);
    check(devices.empty() || size_t(params.main_gpu) < devices.size(), "main_gpu is out of range");
    devices.push_back(nullptr); // llama.cpp's end of the list

    llama_model_params native = llama_model_default_params();
    native.use_extra_bufts = is_matmul_upstreams(); // weights in other layouts, for kernels of upstream
    native.devices = devices.data();
    native.n_gpu_layers = params.n_gpu_layers;
    native.split_mode = llama_split_mode(params.split_mode);
    native.main_gpu = params.main_gpu;
    native.no_alloc = params.no_alloc != 0;
    native.load_mode = params.no_alloc ? LLAMA_LOAD_MODE_NONE : load_mode(params);
    native.check_tensors = params.check_tensors != 0;
    native.vocab_only = params.vocab_only != 0;
    native.tensor_split = params.n_tensor_split > 0 ? split.data() : nullptr;
    if (load != nullptr) {
        native.progress_callback = on_progress;
        native.progress_callback_user_data = load;
    }
    return native;
}

} // namespace

bool trio::on_progress(float progress, void *data) {
    auto *load = static_cast<trio_load *>(data);
    load->progress.store(progress, std::memory_order_relaxed);
    return !load->cancelled.load(std::memory_order_relaxed);
}

void trio_model::release() {
    if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        if (!devices_failed) llama_model_free(native);
        delete this;
    }
}

void trio_model::check_token(int32_t token) const {
    if (token < 0 || token >= info.n_vocab) {
        throw Refused("token " + std::to_string(token) + " is outside the vocabulary of " +
                      std::to_string(info.n_vocab));
    }
}

std::string trio_model::piece(int32_t token) const {
    std::string text(size_t(info.max_piece), '\0');
    const int32_t n =
        info.has_vocab ? llama_token_to_piece(vocab, token, text.data(), int32_t(text.size()), 0, true) : 0;
    if (n < 0) throw Failure(TRIO_E_NATIVE, "the token's piece does not fit");
    text.resize(size_t(n));
    return text;
}

extern "C" {

trio_load *trio_load_new(void) {
    return new (std::nothrow) trio_load;
}

float trio_load_progress(const trio_load *load) {
    return load ? load->progress.load(std::memory_order_relaxed) : 0.0f;
}

void trio_load_cancel(trio_load *load) {
    if (load) load->cancelled.store(true, std::memory_order_relaxed);
}

void trio_load_free(trio_load *load) {
    delete load;
}

int32_t trio_model_open(const char *path, const trio_model_params *params, trio_load *load, trio_model **model) {
    return guard([&] {
        check_pointer(path, "path");
        check_pointer(params, "params");
        check_pointer(model, "model");
        *model = nullptr;
        check(path[0] != '\0', "path is empty");
        std::vector<float> split;
        std::vector<ggml_backend_dev_t> devices;
        const llama_model_params chosen = native_params(*params, load, split, devices);
        llama_model *native = llama_model_load_from_file(path, chosen);
        if (native == nullptr) {
            if (load != nullptr && load->cancelled.load()) throw Failure(TRIO_E_CANCELLED, "loading was cancelled");
            const std::string errors = Scope::errors();
            throw Failure(TRIO_E_LOAD, errors.empty() ? "llama.cpp could not load the file" : errors);
        }
        auto *opened = new trio_model;
        opened->native = native;
        opened->vocab = llama_model_get_vocab(native);
        opened->vocab_only = chosen.vocab_only;
        opened->no_alloc = chosen.no_alloc;
        try {
            opened->architecture = meta_value(native, "general.architecture");
            opened->info = describe(*opened);
            collect_special_tokens(*opened);
        } catch (...) {
            opened->release();
            throw;
        }
        if (load != nullptr) load->progress.store(1.0f, std::memory_order_relaxed);
        *model = opened;
        return TRIO_OK;
    });
}

void trio_model_free(trio_model *model) {
    if (model != nullptr) {
        guard([&] {
            model->release();
            return TRIO_OK;
        });
    }
}

int32_t trio_model_get_info(const trio_model *model, trio_model_info *info) {
    return guard([&] {
        *check_pointer(info, "info") = check_pointer(model, "model")->info;
        return TRIO_OK;
    });
}

int32_t trio_model_description(const trio_model *model, char *buffer, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        char text[512];
        llama_model_desc(model->native, text, sizeof text);
        return copy_text(text, buffer, size);
    });
}

int32_t trio_model_meta_count(const trio_model *model) {
    return guard([&] { return llama_model_meta_count(check_pointer(model, "model")->native); });
}

int32_t trio_model_meta_key(const trio_model *model, int32_t index, char *buffer, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        return copy_meta([&](char *to, size_t n) { return llama_model_meta_key_by_index(model->native, index, to, n); },
                         buffer, size);
    });
}

int32_t trio_model_meta_value(const trio_model *model, int32_t index, char *buffer, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        return copy_meta(
            [&](char *to, size_t n) { return llama_model_meta_val_str_by_index(model->native, index, to, n); }, buffer,
            size);
    });
}

int32_t trio_tokenize(const trio_model *model, const char *text, int32_t length, int32_t add_special,
                      int32_t parse_special, int32_t *tokens, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        check(length >= 0, "length is negative");
        check(size >= 0, "size is negative");
        check(text != nullptr || length == 0, "text is NULL");
        check(tokens != nullptr || size == 0, "tokens is NULL");
        check(model->info.has_vocab != 0, "the model has no vocabulary");
        check_special_tokens(*model, text, length, parse_special != 0);
        int32_t n = 0;
        const auto tokenize = [&] {
            n = llama_tokenize(model->vocab, length ? text : "", length, tokens, size, add_special != 0,
                               parse_special != 0);
        };
        if (length > MAX_BYTES_ON_CALLER) {
            on_big_stack(size_t(length), tokenize);
        } else {
            tokenize();
        }
        if (n == INT32_MIN) throw Refused("the text has too many tokens");
        return n < 0 ? -n : n;
    });
}

int32_t trio_detokenize(const trio_model *model, const int32_t *tokens, int32_t n_tokens, char *buffer, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        check(n_tokens >= 0 && size >= 0, "a length is negative");
        check(tokens != nullptr || n_tokens == 0, "tokens is NULL");
        check(buffer != nullptr || size == 0, "buffer is NULL");
        check(model->info.has_vocab != 0, "the model has no vocabulary");
        for (int32_t i = 0; i < n_tokens; ++i)
            model->check_token(tokens[i]);
        if (n_tokens == 0) return 0;
        const int32_t n = llama_detokenize(model->vocab, tokens, n_tokens, buffer, size, false, true);
        return n < 0 ? -n : n;
    });
}

int32_t trio_token_bytes(const trio_model *model, int32_t token, char *buffer, int32_t size) {
    return guard([&] {
        check_pointer(model, "model");
        check(buffer != nullptr || size <= 0, "buffer is NULL");
        model->check_token(token);
        const std::string text = model->piece(token);
        std::copy_n(text.data(), std::min(text.size(), size_t(std::max(size, 0))), buffer);
        return int32_t(text.size());
    });
}

int32_t trio_token_is_end(const trio_model *model, int32_t token) {
    return guard([&] {
        check_pointer(model, "model");
        model->check_token(token);
        return int32_t(model->info.has_vocab && llama_vocab_is_eog(model->vocab, token));
    });
}

} // extern "C"
