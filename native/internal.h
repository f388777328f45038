// What all parts of the shim share: errors, guards, models, adapters. Nothing here belongs to the C surface
// (trio_llama.h).
//
// Rule 1: every exported function that may reach llama.cpp runs inside guard().
// Rule 2: inside a guard, refuse with `throw Refused(...)` before anything is changed.
// Rule 3: whatever llama.cpp returns as NULL or a code becomes a `throw Failure(code, ...)`.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"
#include "trio_llama.h"

namespace trio {

// Creating more threads than about this fails, which ggml answers with an abort.
constexpr int32_t MAX_THREADS = 512;

// ---- errors --------------------------------------------------------------------------------------------------------

struct Failure : std::runtime_error {
    int32_t code; // TRIO_E_...
    Failure(int32_t code, const std::string &message) : std::runtime_error(message), code(code) {}
};

struct Refused : Failure {
    explicit Refused(const std::string &message) : Failure(TRIO_E_INVALID, message) {}
};

// A GGML_ASSERT or GGML_ABORT on this thread. Some functions of llama.cpp swallow std::exception:
// Scope::assert_fired() is true then too.
struct Assert : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws Refused with the message if the condition is false.
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
    static std::string errors(); // what llama.cpp logged as errors on this thread since the outermost Scope began
};

// While alive, warnings that llama.cpp logs on this thread count as information. For warnings about what the shim does
// on purpose.
class ExpectWarnings {
public:
    ExpectWarnings();
    ~ExpectWarnings();
    ExpectWarnings(const ExpectWarnings &) = delete;
    ExpectWarnings &operator=(const ExpectWarnings &) = delete;
};

void set_last_error(const std::string &message);

// Translates the exception in flight into a code, and sets the last error. To be called in a catch (...) block.
int32_t translate_exception() noexcept;

template <class Body> int32_t guard(Body &&body) noexcept {
    Scope scope;
    try {
        return body();
    } catch (...) {
        return translate_exception();
    }
}

// ---- helpers -------------------------------------------------------------------------------------------------------

// Runs `work` on a thread of its own, whose stack is large enough for recursion over `n_bytes` of input, and rethrows
// what it throws. Throws Failure if no such thread can be started.
void on_big_stack(size_t n_bytes, const std::function<void()> &work);

// The devices with these numbers. Throws Refused for an unknown number and for one that comes twice.
std::vector<ggml_backend_dev_t> find_devices(const int32_t *indices, int32_t n);
int32_t device_number(ggml_backend_dev_t device); // -1: none
bool is_remote(ggml_backend_dev_t device);

// The progress callback of llama.cpp and mtmd. Returns false to make them give up.
bool on_progress(float progress, void *load);

// Copies text to a caller's buffer, cut to size and NUL-terminated. Returns the full length.
int32_t copy_text(const std::string &text, char *buffer, int32_t size);

inline double milliseconds(double seconds) {
    return seconds * 1e3;
}

// CPU seconds of this thread where the platform counts them, so that a busy machine does not make a grammar look slow.
double thread_seconds();

} // namespace trio

// ---- models and adapters -------------------------------------------------------------------------------------------

namespace trio {
class SchemaVocabulary; // schema.h
}

struct trio_load {
    std::atomic<float> progress{0.0f};
    std::atomic<bool> cancelled{false};
};

// Counts its references: a model outlives everything that uses it, whatever the order in which the handles are freed.
struct trio_model {
    llama_model *native = nullptr;
    const llama_vocab *vocab = nullptr;
    bool vocab_only = false;
    bool no_alloc = false;
    // A context that computes on devices has failed. What lies on them is never freed: a backend answers to a lost
    // device with an abort, in a destructor, where nothing can catch it. Devices of rpc-servers do not count: the
    // patches of the RPC plugin make its destructors safe.
    std::atomic<bool> devices_failed{false};
    std::string architecture;
    trio_model_info info{};
    std::vector<std::string> control_texts;      // special tokens found only where the caller asks for them
    std::vector<std::string> user_defined_texts; // special tokens found always
    std::vector<int32_t> end_tokens;             // those that end a generation
    // llama.cpp keeps a set of a model's adapters. Opening and freeing an adapter changes it. A context walks it when
    // it plans its graphs: when it is created, and in the step after its adapters were changed.
    std::mutex adapters_mutex;
    std::mutex schema_mutex;
    std::shared_ptr<trio::SchemaVocabulary> schema_vocabulary_; // made with the first schema
    std::atomic<int32_t> references{1};

    void retain() { references.fetch_add(1, std::memory_order_relaxed); }
    void release();
    void check_token(int32_t token) const;
    std::string piece(int32_t token) const; // special tokens are rendered
    const trio::SchemaVocabulary &schema_vocabulary(); // defined in schema.cpp
};

namespace trio {

// Frees a context of llama.cpp, or gives up what lies on failed devices. Defined in context_open.cpp.
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

// The weights of an adapter. Its handle and the contexts that have it set share them.
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

} // namespace trio

struct trio_adapter {
    std::shared_ptr<trio::Lora> lora;
};
