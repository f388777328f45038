// Projectors and the images that they take, over mtmd. For projector.cpp and media.cpp.
#pragma once

#include "internal.h"

#include <condition_variable>

#include "mtmd.h"

namespace trio {

using Chunks = mtmd::input_chunks_ptr;

// A chunk of an image as the caller sees it: rows, or text around and between them.
struct MediaChunk {
    trio_chunk_info info{};
    std::vector<int32_t> tokens, positions;
};

// Thrown through mtmd to end a computation. It is no std::exception, which mtmd would log as an error.
struct ComputationEnded {};

} // namespace trio

struct trio_projector {
    explicit trio_projector(trio_model *owner) : model(owner) {}

    ~trio_projector() {
        if (has_device && model->devices_failed) (void)native.release();
    }

    trio::ModelReference model;
    mtmd::context_ptr native;
    bool has_device = false;
    trio_projector_info info{};
    int32_t n_threads = 1;
    std::atomic<int32_t> references{1};

    std::mutex mutex; // guards `running`; never held while anything is computed
    std::condition_variable changed;
    const trio_media *running = nullptr; // the image that is being encoded
    double work = 0.0;                   // since the last check for cancellation; belongs to the thread that encodes
    bool only_plans = false;             // a computation ends before its first node

    void retain() { references.fetch_add(1, std::memory_order_relaxed); }
    void release() {
        if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
};

struct trio_media {
    explicit trio_media(trio_projector *owner) : projector(owner) { projector->retain(); }
    ~trio_media() {
        native.reset();
        projector->release();
    }

    trio_projector *projector;
    trio::Chunks native;
    std::vector<trio::MediaChunk> chunks;
    std::atomic<bool> cancelled{false};

    void check_wanted() const {
        if (cancelled.load(std::memory_order_relaxed)) {
            throw trio::Failure(TRIO_E_CANCELLED, "encoding was cancelled");
        }
    }
    const trio::MediaChunk &chunk(int32_t index) const {
        trio::check(index >= 0 && size_t(index) < chunks.size(), "index is out of range");
        return chunks[size_t(index)];
    }
};

namespace trio {

// The errors that mtmd logged, or `otherwise` if there are none.
std::string mtmd_errors(const char *otherwise);

// Makes chunks of an image. Without data, rows are only counted. Any thread may call it.
Chunks tokenize(const trio_projector &projector, const uint8_t *data, int32_t width, int32_t height,
                const std::string &before = "");

// Throws Refused for chunks that a batch of the model cannot have.
std::vector<MediaChunk> describe_all(const trio_projector &projector, const Chunks &chunks);

// mtmd's callback for each node of a graph; `data` is the projector. Throws ComputationEnded if the image was
// cancelled.
bool on_encoder_node(ggml_tensor *node, bool ask, void *data);

} // namespace trio
