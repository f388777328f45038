// Images for a projector: as chunks of rows and text, and encoded. See trio_llama.h for what each function promises.

#include "projector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ggml.h"

using namespace trio;

namespace {

constexpr int32_t MAX_SIDE = 16384; // pixels
constexpr int32_t N_POSITIONS = 4;  // of a row, with M-RoPE

// Multiplications of each thread between two checks for cancellation. They take some tens of milliseconds; starting
// ggml's threads again after a check takes less than one. A single operation may take longer.
constexpr double WORK_BETWEEN_CHECKS = 1e9;

// About how many multiplications a node takes.
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

// While alive, its image is the only one of the projector that is encoded. The constructor waits for that. It throws
// Failure when the image is cancelled.
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

// Throws Refused unless rows further on in a context have the same positions plus the distance. The fourth section of
// M-RoPE is not for positions.
void check_movable(const mtmd_image_tokens *image, const std::vector<int32_t> &positions, int32_t n_rows) {
    constexpr int32_t FAR = 1000;
    const std::vector<int32_t> moved = positions_of(image, n_rows, FAR);
    for (size_t i = 0; i < size_t(n_rows) * (N_POSITIONS - 1); ++i)
        check(moved[i] == positions[i] + FAR,
              "images whose positions depend on their place in the context are not supported");
}

MediaChunk describe(const trio_projector &projector, const mtmd_input_chunk *native) {
    MediaChunk chunk;
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
    check(image != nullptr && chunk.info.n_rows > 0 && chunk.info.n_positions > 0,
          "the projector makes no rows of the image");
    chunk.info.non_causal = mtmd_decode_use_non_causal(projector.native.get(), native);
    if (!mtmd_decode_use_mrope(projector.native.get())) {
        check(chunk.info.n_positions == chunk.info.n_rows,
              "the projector wants positions that the model does not have");
        chunk.positions.resize(size_t(chunk.info.n_rows));
        std::iota(chunk.positions.begin(), chunk.positions.end(), 0);
        return chunk;
    }
    chunk.positions = positions_of(image, chunk.info.n_rows, 0);
    check_movable(image, chunk.positions, chunk.info.n_rows);
    return chunk;
}

} // namespace

std::string trio::mtmd_errors(const char *otherwise) {
    const std::string errors = Scope::errors();
    return errors.empty() ? otherwise : errors;
}

// ggml asks (`ask`) of each node whether it should compute up to it and call again.
bool trio::on_encoder_node(ggml_tensor *node, bool ask, void *data) {
    auto *projector = static_cast<trio_projector *>(data);
    if (projector->only_plans) throw ComputationEnded();
    if (!ask) { // to return false would not end the parts of a graph that other backends compute
        if (projector->running->cancelled.load(std::memory_order_relaxed)) throw ComputationEnded();
        return true;
    }
    projector->work += work_of(node);
    if (projector->work < WORK_BETWEEN_CHECKS * projector->n_threads) return false;
    projector->work = 0.0;
    return true;
}

Chunks trio::tokenize(const trio_projector &projector, const uint8_t *data, int32_t width, int32_t height,
                const std::string &before) {
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

std::vector<MediaChunk> trio::describe_all(const trio_projector &projector, const Chunks &chunks) {
    std::vector<MediaChunk> described;
    for (size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); ++i)
        described.push_back(describe(projector, mtmd_input_chunks_get(chunks.get(), i)));
    const auto is_rows = [](const MediaChunk &chunk) { return chunk.info.is_text == 0; };
    check(std::any_of(described.begin(), described.end(), is_rows), "the projector makes no rows of the image");
    return described;
}

extern "C" {

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
        const MediaChunk &chunk = check_pointer(media, "media")->chunk(index);
        check(chunk.info.is_text != 0, "the chunk has rows, not tokens");
        check(tokens != nullptr || size <= 0, "tokens is NULL");
        std::copy_n(chunk.tokens.begin(), std::min(chunk.tokens.size(), size_t(std::max(size, 0))), tokens);
        return int32_t(chunk.tokens.size());
    });
}

int32_t trio_media_positions(const trio_media *media, int32_t index, int32_t *positions, int32_t size) {
    return guard([&] {
        const MediaChunk &chunk = check_pointer(media, "media")->chunk(index);
        check(chunk.info.is_text == 0, "the chunk has tokens, not rows");
        check(positions != nullptr || size <= 0, "positions is NULL");
        std::copy_n(chunk.positions.begin(), std::min(chunk.positions.size(), size_t(std::max(size, 0))), positions);
        return int32_t(chunk.positions.size());
    });
}

int32_t trio_media_encode(trio_media *media, int32_t index, float *rows, int64_t size) {
    return guard([&] {
        const MediaChunk &chunk = check_pointer(media, "media")->chunk(index);
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
        } catch (const ComputationEnded &) { // cancelled: see below
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
    const std::lock_guard<std::mutex> lock(projector.mutex); // otherwise a thread that is about to wait would miss it
    media->cancelled.store(true, std::memory_order_relaxed);
    projector.changed.notify_all();
}

} // extern "C"
