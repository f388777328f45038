// Projectors, which turn images into rows for a model, over mtmd. See trio_llama.h for what each function promises.

#include "trio_internal.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <numeric>

#include "ggml.h"
#include "mtmd.h"

using namespace trio;

namespace {

constexpr int32_t MAX_THREADS = 512;
constexpr int32_t MAX_SIDE = 16384; // pixels
constexpr int32_t N_POSITIONS = 4;  // of a row, with M-RoPE

// Multiplications of each thread between two looks at whether the image is still wanted: some tens of milliseconds,
// against less than one for making ggml's threads anew. A single operation may take longer.
constexpr double WORK_BETWEEN_LOOKS = 1e9;

// What mtmd is asked about at once, to learn what it makes of images: no pixels are needed to count rows.
constexpr int32_t SMALL_SIDE = 64, LARGE_SIDE = 4096;

double work_of(const ggml_tensor *node) {
    const double n = double(ggml_nelements(node));
    switch (node->op) {
    case GGML_OP_MUL_MAT:
        return n * double(node->src[0]->ne[0]);
    case GGML_OP_FLASH_ATTN_EXT: // keys, and values
        return 2.0 * n * double(node->src[1]->ne[1]);
    case GGML_OP_CONV_2D:
        return n * double(ggml_nelements(node->src[0])) / double(std::max(node->ne[2], int64_t(1)));
    default:
        return n;
    }
}

using Chunks = mtmd::input_chunks_ptr;

struct Chunk {
    trio_chunk_info info{};
    std::vector<int32_t> tokens, positions;
};

} // namespace

struct trio_projector {
    explicit trio_projector(trio_model *owner) : model(owner) {}

    ~trio_projector() {
        if (has_device && model->devices_failed) (void)native.release();
    }

    ModelReference model;
    mtmd::context_ptr native;
    bool has_device = false;
    trio_projector_info info{};
    int32_t n_threads = 1;
    std::atomic<int32_t> references{1};

    std::mutex mutex; // guards `running`; never held while anything is computed
    std::condition_variable changed;
    const trio_media *running = nullptr; // what is being encoded
    double work = 0.0;                   // since the last look; of the thread that encodes
    bool only_plans = false;             // nothing is to be computed

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
    Chunks native;
    std::vector<Chunk> chunks;
    std::atomic<bool> cancelled{false};

    void check_wanted() const {
        if (cancelled.load(std::memory_order_relaxed)) throw Failure(TRIO_E_CANCELLED, "encoding was cancelled");
    }
    const Chunk &chunk(int32_t index) const {
        check(index >= 0 && size_t(index) < chunks.size(), "index is out of range");
        return chunks[size_t(index)];
    }
};

namespace {

// Nothing more is to be computed. No std::exception: mtmd would write it to the log, as an error.
struct Stopped {};

// ggml asks (`ask`) of each node whether it should compute up to it and call again.
bool on_node(ggml_tensor *node, bool ask, void *data) {
    auto *projector = static_cast<trio_projector *>(data);
    if (projector->only_plans) throw Stopped();
    if (!ask) { // with false, ggml would go on with what another backend computes
        if (projector->running->cancelled.load(std::memory_order_relaxed)) throw Stopped();
        return true;
    }
    projector->work += work_of(node);
    if (projector->work < WORK_BETWEEN_LOOKS * projector->n_threads) return false;
    projector->work = 0.0;
    return true;
}

// The only one to compute, for as long as it lives. Throws Failure when the image is not wanted any more.
class Turn {
public:
    explicit Turn(const trio_media &media) : projector_(*media.projector) {
        std::unique_lock<std::mutex> lock(projector_.mutex);
        projector_.changed.wait(lock, [&] {
            media.check_wanted();
            return projector_.running == nullptr;
        });
        projector_.running = &media;
        projector_.work = 0.0;
    }
    ~Turn() {
        std::lock_guard<std::mutex> lock(projector_.mutex);
        projector_.running = nullptr;
        projector_.changed.notify_all();
    }
    Turn(const Turn &) = delete;
    Turn &operator=(const Turn &) = delete;

private:
    trio_projector &projector_;
};

std::string mtmd_errors(const char *otherwise) {
    const std::string errors = Scope::errors();
    return errors.empty() ? otherwise : errors;
}

// ---- images as chunks ----------------------------------------------------------------------------------------------

// No data: rows are counted only. Any thread may do this.
Chunks tokenize(const trio_projector &projector, const uint8_t *data, int32_t width, int32_t height,
                const std::string &before = "") {
    const mtmd::bitmap_ptr bitmap(mtmd_bitmap_init(uint32_t(width), uint32_t(height), data));
    const mtmd_bitmap *const bitmaps[] = {bitmap.get()};
    const std::string text = before + mtmd_default_marker();
    const mtmd_input_text input{text.c_str(), text.size(), false, true};
    Chunks chunks(mtmd_input_chunks_init());
    if (mtmd_tokenize(projector.native.get(), chunks.get(), &input, bitmaps, 1) != 0) {
        throw Refused(mtmd_errors("the projector cannot take the image"));
    }
    return chunks;
}

std::vector<int32_t> positions_of(const mtmd_image_tokens *image, int32_t n_rows, int32_t first) {
    std::vector<int32_t> positions(size_t(n_rows) * N_POSITIONS);
    for (int32_t row = 0; row < n_rows; ++row) {
        const mtmd_decoder_pos position = mtmd_image_tokens_get_decoder_pos(image, first, size_t(row));
        const uint32_t sections[N_POSITIONS] = {position.t, position.y, position.x, position.z};
        for (int32_t section = 0; section < N_POSITIONS; ++section)
            positions[size_t(section) * size_t(n_rows) + size_t(row)] = int32_t(sections[section]);
    }
    return positions;
}

// Throws Refused where rows further on in a context are not at the same positions, only further on. The fourth section
// of M-RoPE is not for positions.
void check_movable(const mtmd_image_tokens *image, const std::vector<int32_t> &positions, int32_t n_rows) {
    constexpr int32_t FAR = 1000;
    const std::vector<int32_t> moved = positions_of(image, n_rows, FAR);
    for (size_t i = 0; i < size_t(n_rows) * (N_POSITIONS - 1); ++i)
        check(moved[i] == positions[i] + FAR, "images whose positions depend on where they stand are not supported");
}

Chunk describe(const trio_projector &projector, const mtmd_input_chunk *native) {
    Chunk chunk;
    chunk.info.n_rows = int32_t(mtmd_input_chunk_get_n_tokens(native));
    chunk.info.n_positions = int32_t(mtmd_input_chunk_get_n_pos(native));
    if (mtmd_input_chunk_get_type(native) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
        size_t n_tokens = 0;
        const llama_token *tokens = mtmd_input_chunk_get_tokens_text(native, &n_tokens);
        chunk.info.is_text = 1;
        chunk.tokens.assign(tokens, tokens + n_tokens);
        for (const int32_t token : chunk.tokens)
            check(token >= 0 && token < projector.model->info.n_vocab,
                  "the model's vocabulary lacks a token that belongs to images of this projector");
        return chunk;
    }
    const mtmd_image_tokens *image = mtmd_input_chunk_get_tokens_image(native);
    check(image != nullptr && chunk.info.n_rows > 0 && chunk.info.n_positions > 0, "the projector makes no rows of it");
    chunk.info.both_ways = mtmd_decode_use_non_causal(projector.native.get(), native);
    if (!mtmd_decode_use_mrope(projector.native.get())) {
        check(chunk.info.n_positions == chunk.info.n_rows, "the projector wants positions that the model does not have");
        chunk.positions.resize(size_t(chunk.info.n_rows));
        std::iota(chunk.positions.begin(), chunk.positions.end(), 0);
        return chunk;
    }
    chunk.positions = positions_of(image, chunk.info.n_rows, 0);
    check_movable(image, chunk.positions, chunk.info.n_rows);
    return chunk;
}

std::vector<Chunk> describe_all(const trio_projector &projector, const Chunks &chunks) {
    std::vector<Chunk> described;
    for (size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); ++i)
        described.push_back(describe(projector, mtmd_input_chunks_get(chunks.get(), i)));
    const auto is_rows = [](const Chunk &chunk) { return chunk.info.is_text == 0; };
    check(std::any_of(described.begin(), described.end(), is_rows), "the projector makes nothing of it");
    return described;
}

int32_t max_rows(const std::vector<Chunk> &chunks) {
    int32_t most = 0;
    for (const Chunk &chunk : chunks)
        if (!chunk.info.is_text) most = std::max(most, chunk.info.n_rows);
    return most;
}

// ---- loading -------------------------------------------------------------------------------------------------------

mtmd_context_params native_params(const trio_projector_params &params, trio_projector *projector, trio_load *load) {
    mtmd_context_params native = mtmd_context_params_default();
    native.use_gpu = params.device >= 0;
    if (params.device >= 0) native.device = find_devices(&params.device, 1).front();
    native.print_timings = false;
    native.n_threads = params.n_threads;
    native.flash_attn_type = llama_flash_attn_type(params.flash_attention);
    native.warmup = false;
    native.cb_eval = on_node;
    native.cb_eval_user_data = projector;
    if (load != nullptr) {
        native.progress_callback = on_progress;
        native.progress_callback_user_data = load;
    }
    return native;
}

// Throws Refused for what would go wrong with every image.
int32_t try_images(const trio_projector &projector) {
    const std::vector<Chunk> small = describe_all(projector, tokenize(projector, nullptr, SMALL_SIDE, SMALL_SIDE));
    const std::vector<Chunk> behind = describe_all(projector, tokenize(projector, nullptr, SMALL_SIDE, SMALL_SIDE, "a"));
    check(max_rows(small) == max_rows(behind), "images whose rows depend on where they stand are not supported");
    return max_rows(describe_all(projector, tokenize(projector, nullptr, LARGE_SIDE, LARGE_SIDE)));
}

// Has mtmd do everything for a small image but compute. What in the file does not fit together asserts on the way: here,
// where it is caught, and not with the first image of somebody's.
void try_to_plan(trio_projector &projector) {
    const std::vector<uint8_t> grey(size_t(3) * SMALL_SIDE * SMALL_SIDE, 128);
    const Chunks chunks = tokenize(projector, grey.data(), SMALL_SIDE, SMALL_SIDE);
    size_t index = 0;
    while (mtmd_input_chunk_get_type(mtmd_input_chunks_get(chunks.get(), index)) == MTMD_INPUT_CHUNK_TYPE_TEXT)
        ++index; // describe_all() has seen to it that there is one
    projector.only_plans = true;
    try {
        mtmd_encode_chunk(projector.native.get(), mtmd_input_chunks_get(chunks.get(), index));
    } catch (const Stopped &) { // a graph was made, and there is memory for it
        projector.only_plans = false;
        return;
    }
    throw Failure(TRIO_E_LOAD, mtmd_errors("mtmd cannot encode images with the file"));
}

void open_native(trio_projector &projector, const char *path, mtmd_context_params params, const trio_load *load) {
    const llama_model *model = projector.model->native;
    projector.native.reset();
    projector.native.reset(mtmd_init_from_file(path, model, params));
    if (!projector.native && params.image_max_tokens > 0 &&
        Scope::errors().find("image_min_pixels") != std::string::npos) {
        // Fewer rows than the smallest image has. Sides are rounded up to whole rows: leave room for it.
        params.image_min_tokens = std::max(params.image_max_tokens / 2, 1);
        projector.native.reset(mtmd_init_from_file(path, model, params));
    }
    const mtmd_context *native = projector.native.get();
    if (native == nullptr) {
        if (load != nullptr && load->cancelled.load()) throw Failure(TRIO_E_CANCELLED, "loading was cancelled");
        throw Failure(TRIO_E_LOAD, mtmd_errors("mtmd could not load the file"));
    }
    trio_projector_info &info = projector.info;
    info.n_embd = llama_model_n_embd_inp(model);
    info.has_vision = mtmd_support_vision(native);
    info.has_audio = mtmd_support_audio(native);
    info.mrope = mtmd_decode_use_mrope(native);
    info.both_ways = mtmd_decode_use_non_causal(native, nullptr);
    if (!info.has_vision) throw Failure(TRIO_E_LOAD, "the projector is for sounds, not for images");
    try {
        info.max_rows = try_images(projector);
    } catch (const Refused &refused) {
        throw Failure(TRIO_E_LOAD, refused.what());
    }
}

} // namespace

extern "C" {

int32_t trio_projector_open(trio_model *model, const char *path, const trio_projector_params *params, trio_load *load,
                            trio_projector **projector) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(path, "path");
        check_pointer(params, "params");
        *check_pointer(projector, "projector") = nullptr;
        check(path[0] != '\0', "path is empty");
        check(params->n_threads >= 1 && params->n_threads <= MAX_THREADS, "n_threads must be between 1 and 512");
        check(params->flash_attention >= -1 && params->flash_attention <= 1, "flash_attention must be -1, 0 or 1");
        check(params->max_rows >= 0 && params->max_rows <= 1 << 16, "max_rows is out of range");
        check(!model->vocab_only && !model->no_alloc, "the model was loaded without its weights");
        check(model->info.has_vocab != 0, "the model has no vocabulary");

        auto opened = std::make_unique<trio_projector>(model);
        opened->n_threads = params->n_threads;
        opened->has_device = params->device >= 0;
        mtmd_context_params native = native_params(*params, opened.get(), load);
        open_native(*opened, path, native, load);
        const trio_projector_info &info = opened->info;
        if ((info.mrope || info.both_ways) && params->max_rows > 0 && info.max_rows > params->max_rows) {
            native.image_max_tokens = params->max_rows;
            open_native(*opened, path, native, load);
        }
        try_to_plan(*opened);
        if (load != nullptr) load->progress.store(1.0f, std::memory_order_relaxed);
        *projector = opened.release();
        return TRIO_OK;
    });
}

void trio_projector_free(trio_projector *projector) {
    if (projector != nullptr) {
        guard([&] {
            projector->release();
            return TRIO_OK;
        });
    }
}

int32_t trio_projector_get_info(const trio_projector *projector, trio_projector_info *info) {
    return guard([&] {
        *check_pointer(info, "info") = check_pointer(projector, "projector")->info;
        return TRIO_OK;
    });
}

int32_t trio_media_open(trio_projector *projector, const uint8_t *data, int64_t n_bytes, int32_t width, int32_t height,
                        trio_media **media) {
    return guard([&] {
        check_pointer(projector, "projector");
        check_pointer(data, "data");
        *check_pointer(media, "media") = nullptr;
        check(width >= 1 && width <= MAX_SIDE && height >= 1 && height <= MAX_SIDE,
              "an image has sides of 1 to 16384 pixels");
        check(n_bytes == 3 * int64_t(width) * height, "n_bytes is not 3 for each pixel");
        auto opened = std::make_unique<trio_media>(projector);
        opened->native = tokenize(*projector, data, width, height);
        opened->chunks = describe_all(*projector, opened->native);
        *media = opened.release();
        return TRIO_OK;
    });
}

void trio_media_free(trio_media *media) {
    guard([&] {
        delete media;
        return TRIO_OK;
    });
}

int32_t trio_media_count(const trio_media *media) {
    return guard([&] { return int32_t(check_pointer(media, "media")->chunks.size()); });
}

int32_t trio_media_get_chunk(const trio_media *media, int32_t index, trio_chunk_info *info) {
    return guard([&] {
        check_pointer(media, "media");
        *check_pointer(info, "info") = media->chunk(index).info;
        return TRIO_OK;
    });
}

int32_t trio_media_tokens(const trio_media *media, int32_t index, int32_t *tokens, int32_t size) {
    return guard([&] {
        const Chunk &chunk = check_pointer(media, "media")->chunk(index);
        check(chunk.info.is_text != 0, "the chunk has rows, not tokens");
        check(tokens != nullptr || size <= 0, "tokens is NULL");
        std::copy_n(chunk.tokens.begin(), std::min(chunk.tokens.size(), size_t(std::max(size, 0))), tokens);
        return int32_t(chunk.tokens.size());
    });
}

int32_t trio_media_positions(const trio_media *media, int32_t index, int32_t *positions, int32_t size) {
    return guard([&] {
        const Chunk &chunk = check_pointer(media, "media")->chunk(index);
        check(chunk.info.is_text == 0, "the chunk has tokens, not rows");
        check(positions != nullptr || size <= 0, "positions is NULL");
        std::copy_n(chunk.positions.begin(), std::min(chunk.positions.size(), size_t(std::max(size, 0))), positions);
        return int32_t(chunk.positions.size());
    });
}

int32_t trio_media_encode(trio_media *media, int32_t index, float *rows, int64_t size) {
    return guard([&] {
        const Chunk &chunk = check_pointer(media, "media")->chunk(index);
        check_pointer(rows, "rows");
        check(chunk.info.is_text == 0, "the chunk has tokens, not rows");
        trio_projector &projector = *media->projector;
        const int64_t n = int64_t(chunk.info.n_rows) * projector.info.n_embd;
        check(size >= n, "there is no room for the rows");

        const Turn turn(*media);
        const mtmd_input_chunk *native = mtmd_input_chunks_get(media->native.get(), size_t(index));
        int32_t code = 0;
        try {
            code = mtmd_encode_chunk(projector.native.get(), native);
        } catch (const Stopped &) { // it is not wanted any more
        } catch (...) {
            if (projector.has_device) projector.model->devices_failed = true;
            throw;
        }
        media->check_wanted();
        if (code != 0) {
            const int32_t kind = Scope::assert_fired() ? TRIO_E_ASSERT : TRIO_E_NATIVE;
            throw Failure(kind, mtmd_errors("mtmd could not encode the image"));
        }
        const float *encoded = mtmd_get_output_embd(projector.native.get());
        if (!std::all_of(encoded, encoded + n, [](float value) { return std::isfinite(value); })) {
            throw Failure(TRIO_E_NATIVE, "the projector computed rows that are not numbers");
        }
        std::copy_n(encoded, n, rows);
        return TRIO_OK;
    });
}

void trio_media_cancel(trio_media *media) {
    if (media == nullptr) return;
    trio_projector &projector = *media->projector;
    const std::lock_guard<std::mutex> lock(projector.mutex); // or it would miss who is about to wait
    media->cancelled.store(true, std::memory_order_relaxed);
    projector.changed.notify_all();
}

} // extern "C"
