// What the translation units of the shim share. Nothing here is part of the C surface (trio_llama.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "llama.h"
#include "trio_llama.h"

namespace trio {

// Rule 1: every exported function that may reach llama.cpp runs inside guard().
// Rule 2: inside a guard, refuse with `throw Refused(...)` before anything is changed.
// Rule 3: whatever llama.cpp returns as NULL or a code becomes a `throw Failure(code, ...)`.

struct Failure : std::runtime_error {
    int32_t code;
    Failure(int32_t code, const std::string &message) : std::runtime_error(message), code(code) {}
};

struct Refused : Failure {
    explicit Refused(const std::string &message) : Failure(TRIO_E_INVALID, message) {}
};

// A GGML_ASSERT or GGML_ABORT on this thread. Some llama.cpp functions swallow std::exception; Scope::assert_fired()
// tells of the assert all the same.
struct Assert : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void check(bool condition, const char *message);

template <class T> T *check_pointer(T *pointer, const char *name) {
    if (pointer == nullptr) throw Refused(std::string(name) + " is NULL");
    return pointer;
}

// While a Scope is alive on a thread, asserts on it throw `Assert` instead of ending the process, and error lines of
// the log are kept. Scopes nest.
class Scope {
public:
    Scope();
    ~Scope();
    Scope(const Scope &) = delete;
    Scope &operator=(const Scope &) = delete;
    static bool assert_fired();
    static std::string errors(); // what llama.cpp logged as an error on this thread since the outermost Scope began
};

// While alive, what llama.cpp logs on this thread as a warning counts as information: for warnings about what the shim
// does on purpose.
class ExpectWarnings {
public:
    ExpectWarnings();
    ~ExpectWarnings();
    ExpectWarnings(const ExpectWarnings &) = delete;
    ExpectWarnings &operator=(const ExpectWarnings &) = delete;
};

void set_last_error(const std::string &message);

// Translates the exception in flight: to be called in a catch (...) block. Sets the last error.
int32_t translate_exception() noexcept;

template <class Body> int32_t guard(Body &&body) noexcept {
    Scope scope;
    try {
        return body();
    } catch (...) {
        return translate_exception();
    }
}

// Runs `work` on a thread of its own, with a stack that recursion over `n_bytes` of input does not exhaust, and
// rethrows what it throws. Throws Failure where such a thread cannot be had.
void on_big_stack(size_t n_bytes, const std::function<void()> &work);

// The devices of these numbers. Throws Refused for a number that is none, or that comes twice.
std::vector<ggml_backend_dev_t> find_devices(const int32_t *indices, int32_t n);
int32_t device_number(ggml_backend_dev_t device); // -1: none
bool is_remote(ggml_backend_dev_t device);

// Progress of a load, for llama.cpp and mtmd: false tells them to give up.
bool on_progress(float progress, void *load);

// Copies text to a caller's buffer, cut to size and NUL-terminated. Returns the full length.
int32_t copy_text(const std::string &text, char *buffer, int32_t size);

struct SamplerDeleter {
    void operator()(llama_sampler *sampler) const { llama_sampler_free(sampler); }
};
using SamplerPtr = std::unique_ptr<llama_sampler, SamplerDeleter>;

inline double milliseconds(double seconds) {
    return seconds * 1e3;
}

// CPU seconds of this thread where the platform counts them, so that a crowded machine does not make a grammar look
// slow.
double thread_seconds();

} // namespace trio

struct trio_load {
    std::atomic<float> progress{0.0f};
    std::atomic<bool> cancelled{false};
};

// Counted, so that a model outlives whatever still uses it, in whatever order the handles are freed.
struct trio_model {
    llama_model *native = nullptr;
    const llama_vocab *vocab = nullptr;
    bool vocab_only = false;
    bool no_alloc = false;
    // A context failed that computes on devices. What lies on them is never freed: that would end in an abort, in a
    // destructor, where nothing can catch it. Those of rpc-servers do not count: see rpc_patch.cmake.
    std::atomic<bool> devices_failed{false};
    std::string architecture;
    trio_model_info info{};
    std::vector<std::string> control_texts;      // special tokens found only where the caller asks for them
    std::vector<std::string> user_defined_texts; // special tokens found always
    // llama.cpp keeps a set of a model's adapters. It adds to it and removes from it when they are opened and freed, and
    // walks it when a context plans its graphs: when it is made, and in the step after its adapters were changed.
    std::mutex adapters_mutex;
    std::atomic<int32_t> references{1};

    void retain() { references.fetch_add(1, std::memory_order_relaxed); }
    void release();
    void check_token(int32_t token) const;
    std::string piece(int32_t token) const; // special tokens are rendered
};

namespace trio {

struct ContextDeleter {
    trio_model *model;
    void operator()(llama_context *context) const noexcept;
};

class ModelReference {
public:
    explicit ModelReference(trio_model *model) : model_(model) { model_->retain(); }
    ~ModelReference() { model_->release(); }
    ModelReference(const ModelReference &) = delete;
    ModelReference &operator=(const ModelReference &) = delete;
    trio_model *operator->() const { return model_; }
    trio_model *get() const { return model_; }

private:
    trio_model *model_;
};

// Weights of an adapter: what its handle and the contexts that have it set share.
class Lora {
public:
    Lora(trio_model *model, llama_adapter_lora *native) : model_(model), native_(native) {}
    ~Lora() {
        if (model_->devices_failed) return;
        std::lock_guard<std::mutex> lock(model_->adapters_mutex);
        llama_adapter_lora_free(native_);
    }
    Lora(const Lora &) = delete;
    Lora &operator=(const Lora &) = delete;
    trio_model *model() const { return model_.get(); }
    llama_adapter_lora *native() const { return native_; }

private:
    ModelReference model_;
    llama_adapter_lora *native_;
};

// The three penalties on repeated tokens. llama.cpp's own sampler looks every candidate up in a hash table; this one goes
// to the tokens of the window alone.
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

// The k candidates of the greatest logits, the greatest first; of equal ones the lower token comes first. Those of
// negative infinity are left out. `best` has room for k. Returns how many there are.
size_t select_top(const float *logits, int32_t n_vocab, int32_t k, llama_token_data *best);

// What choosing a token works on: room for the whole vocabulary.
struct Scratch {
    explicit Scratch(int32_t n_vocab) : logits(size_t(n_vocab)), candidates(size_t(n_vocab)) {}
    std::vector<float> logits;
    std::vector<llama_token_data> candidates;
};

} // namespace trio

struct trio_adapter {
    std::shared_ptr<trio::Lora> lora;
};

struct trio_sampler {
    trio_sampler(trio_model *owner, const trio_sampler_params &params);

    // Chooses a token from one row of logits and remembers it. Throws Failure; after that the sampler refuses further
    // use.
    int32_t sample(const float *logits, trio::Scratch &scratch);
    void accept_prompt(const int32_t *tokens, int32_t n_tokens);

    trio::ModelReference model;
    int32_t n_top;
    uint64_t step = 0;   // the last trio_step that used it: one sampler may serve only one row
    bool broken = false; // it failed in the middle of a token

private:
    const float *adjust(const float *logits, trio::Scratch &scratch) const;
    llama_token_data_array all_candidates(const float *adjusted, trio::Scratch &scratch);
    llama_token_data_array head_candidates(const float *adjusted, trio::Scratch &scratch) const;
    int32_t choose(llama_token_data_array array);
    void charge_grammar(double seconds);

    std::vector<llama_logit_bias> bias;
    trio::Penalties penalties;
    int32_t prompt_window; // prompt tokens that any penalty looks at
    trio::SamplerPtr dry;
    std::vector<trio::SamplerPtr> chain; // the last one selects; empty: greedy
    int32_t n_head = 0; // the chain looks at so many of the best candidates only; 0: at all
    trio::SamplerPtr grammar;
    double grammar_soft_limit = 0.0; // seconds
    int32_t n_slow_grammar_steps = 0;
};
