// A context, shared by context_open, context_checks, context_step and context_memory.
#pragma once

#include "internal.h"
#include "sampler.h"
#include "thread_team.h"

#include <cstring>

struct ggml_threadpool;

namespace trio {

// Threads of ggml that live as long as their context. Without them, ggml creates new ones for every graph.
class Threadpool {
public:
    explicit Threadpool(int32_t n_threads); // native() is NULL if the CPU plugin has no thread pools
    ~Threadpool();
    Threadpool(const Threadpool &) = delete;
    Threadpool &operator=(const Threadpool &) = delete;
    ggml_threadpool *native() const { return native_; }

private:
    ggml_threadpool *native_ = nullptr;
    void (*free_)(ggml_threadpool *) = nullptr;
};

} // namespace trio

struct trio_context {
    explicit trio_context(trio_model *owner) : model(owner) { scratch.emplace_back(owner->info.n_vocab); }

    trio::ModelReference model;

    // ---- declared before `native`, which uses them until it is freed
    std::unique_ptr<trio::Threadpool> threadpool, threadpool_batch; // for narrow steps, and for wide ones
    std::vector<std::shared_ptr<trio::Lora>> adapters;              // that are set now
    int32_t n_threads = 1, n_threads_batch = 1;
    bool is_narrow = false; // the thread pool for narrow steps is attached
    std::atomic<uint64_t> aborted_number{0};
    mutable std::atomic<uint64_t> seen_number{0}; // of the last batch that was seen to be aborted
    uint64_t running_number = 0; // of the batch that is being decoded
    bool abort_armed = true;     // false while an aborted graph would leave the KV cache wrong

    // ---- as it was opened
    std::unique_ptr<llama_context, trio::ContextDeleter> native{nullptr, trio::ContextDeleter{model.get()}};
    llama_memory_t memory = nullptr;
    trio_context_info info{};
    bool has_devices = false;  // besides the CPU
    bool has_remote = false;   // one of them belongs to an rpc-server
    bool has_local = false;    // one of them does not
    bool is_recurrent = false; // its state cannot be taken back to an earlier position
    // llama.cpp gives a cell of one sequence alone to others once the cell is out of its sliding window, even where the
    // cache has room for all. If the sequence were then cut, what is left would be incomplete. So each sequence has a
    // shadow: a second sequence that shares all its cells and is never read.
    bool has_shadows = false;
    bool loses_cells = false; // it needs shadows and cannot have them

    // ---- between two steps
    char poison[512] = "";   // why it can only be freed; not a string, because memory may be what ran out
    bool embeddings = false; // llama.cpp was last told to compute them
    bool has_embeddings = false; // the last step computed them
    bool shift_pending = false;  // trio_seq_add was called; the next decode carries it out
    bool plan_pending = false;   // adapters were changed; the next batch plans its graphs again
    uint64_t step = 0;
    std::vector<int8_t> outputs;            // of the last batch
    std::vector<int8_t> has_encoder_tokens; // of each sequence: the encoder has read them

    // ---- memory that steps use again
    std::vector<int32_t> last_positions; // of each sequence in the batch being checked; -1: not in it
    std::vector<int32_t> tokens, positions, n_seq_ids;
    std::vector<llama_seq_id> seqs;
    std::vector<llama_seq_id *> seq_pointers;
    std::vector<int8_t> native_outputs;
    std::unique_ptr<trio::ThreadTeam> sampling_team; // where there is much to sample
    std::vector<trio::Scratch> scratch;              // of each of its members
    std::vector<const float *> logits;

    // A number may come again after another batch was aborted.
    void begin_batch(uint64_t number) {
        running_number = number;
        seen_number.store(0, std::memory_order_relaxed);
    }

    // Once true, true until the batch ends: a product may have seen it, and left its results unfinished.
    bool is_aborted() const {
        if (running_number == 0) return false;
        if (aborted_number.load(std::memory_order_relaxed) == running_number)
            seen_number.store(running_number, std::memory_order_relaxed);
        return seen_number.load(std::memory_order_relaxed) == running_number;
    }
    void check_alive() const {
        if (poison[0] != '\0') {
            throw trio::Failure(TRIO_E_ASSERT, std::string("the context is poisoned: ") + poison);
        }
    }
    void check_seq(int32_t seq) const {
        if (seq < 0 || seq >= info.n_seq_max) {
            throw trio::Refused("sequence " + std::to_string(seq) + " does not exist");
        }
    }
    int32_t shadow(int32_t seq) const { return seq + info.n_seq_max; }
    int32_t last_position(int32_t seq) const { return llama_memory_seq_pos_max(memory, seq); }
    bool remove(int32_t seq, int32_t start, int32_t end) {
        if (has_shadows) llama_memory_seq_rm(memory, shadow(seq), start, end);
        return llama_memory_seq_rm(memory, seq, start, end);
    }
};

namespace trio {

// Thrown through llama.cpp to abort a batch on devices.
struct BatchAborted {};

inline bool is_encoder_decoder(const trio_model &model) {
    return model.info.has_encoder && model.info.has_decoder;
}

// For calls into llama.cpp that change the context. An exception in the middle of one leaves it in an unknown state,
// so it is poisoned: it can only be freed.
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

// Attaches the threads for narrow steps or for wide ones. Defined in context_step.cpp.
void attach_threads(trio_context &context, bool is_narrow);

// The rest is defined in context_checks.cpp. Each throws Refused before anything is changed.

void check_context_params(const trio_model &model, const trio_context_params &params);

// Returns whether the batch is narrow: few rows, and at most one of each sequence, so none of a prompt.
bool check_batch(trio_context &context, const trio_batch &batch);

// The same for a batch of encoder tokens.
bool check_encoder_batch(trio_context &context, const trio_batch &batch);

void check_request(trio_context &context, const trio_batch &batch, const trio_sample_request *request,
                   const trio_sample_result *result);

} // namespace trio
