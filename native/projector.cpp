// Projectors, which turn images into rows for a model, over mtmd. See trio_llama.h for what each function promises.

#include "projector.h"

#include <algorithm>

using namespace trio;

namespace {

// The images that mtmd is asked about when a projector is opened. Rows are counted without pixels.
constexpr int32_t SMALL_SIDE = 64, LARGE_SIDE = 4096;

int32_t max_rows(const std::vector<MediaChunk> &chunks) {
    int32_t most = 0;
    for (const MediaChunk &chunk : chunks)
        if (!chunk.info.is_text) most = std::max(most, chunk.info.n_rows);
    return most;
}

mtmd_context_params native_params(const trio_projector_params &params, trio_projector *projector, trio_load *load) {
    mtmd_context_params native = mtmd_context_params_default();
    native.use_gpu = params.device >= 0;
    if (params.device >= 0) native.device = find_devices(&params.device, 1).front();
    native.print_timings = false;
    native.n_threads = params.n_threads;
    native.flash_attn_type = llama_flash_attn_type(params.flash_attention);
    native.warmup = false;
    native.cb_eval = on_encoder_node;
    native.cb_eval_user_data = projector;
    if (load != nullptr) {
        native.progress_callback = on_progress;
        native.progress_callback_user_data = load;
    }
    return native;
}

// Returns the most rows in one chunk of a large image. Throws Refused for what would go wrong with every image.
int32_t try_images(const trio_projector &projector) {
    const std::vector<MediaChunk> small = describe_all(projector, tokenize(projector, nullptr, SMALL_SIDE, SMALL_SIDE));
    const std::vector<MediaChunk> behind =
        describe_all(projector, tokenize(projector, nullptr, SMALL_SIDE, SMALL_SIDE, "a"));
    check(max_rows(small) == max_rows(behind),
          "images whose rows depend on their place in the context are not supported");
    return max_rows(describe_all(projector, tokenize(projector, nullptr, LARGE_SIDE, LARGE_SIDE)));
}

// Has mtmd prepare the encoding of a small image, without computing it. If parts of the file do not fit together, an
// assert fails on the way: that happens here, where it is caught, instead of with a client's first image.
void try_to_plan(trio_projector &projector) {
    const std::vector<uint8_t> grey(size_t(3) * SMALL_SIDE * SMALL_SIDE, 128);
    const Chunks chunks = tokenize(projector, grey.data(), SMALL_SIDE, SMALL_SIDE);
    size_t index = 0;
    while (mtmd_input_chunk_get_type(mtmd_input_chunks_get(chunks.get(), index)) == MTMD_INPUT_CHUNK_TYPE_TEXT)
        ++index; // describe_all() has checked that there is one
    projector.only_plans = true;
    try {
        mtmd_encode_chunk(projector.native.get(), mtmd_input_chunks_get(chunks.get(), index));
    } catch (const ComputationEnded &) { // a graph was made, and there is memory for it
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
        // The limit is below the rows of the smallest image. Sides are rounded up to whole rows: leave room for that.
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
    info.non_causal = mtmd_decode_use_non_causal(native, nullptr);
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
        if ((info.mrope || info.non_causal) && params->max_rows > 0 && info.max_rows > params->max_rows) {
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

} // extern "C"
