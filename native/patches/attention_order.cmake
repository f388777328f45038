# Attention on a CPU is told which sequence each row belongs to, and the place of each cell in its sequence.
#
# Why: sums are rounded in the order in which they are made. A mask says which cells a row sees, but not in which order
# they were computed: llama.cpp fills gaps, so later cells of a sequence may lie before earlier ones. attention.cpp sums
# in the order of places, which is the same wherever the cells lie.
# How: beside each mask of a graph there is one more input, of n_kv + n_rows + 2 integers for each stream: the place of
# each cell, or -1 if the cell is empty; the sequence of each row; and a number of 64 bits, another one each time. It is
# filled when the mask is. By the number, attention.cpp knows that all layers of a graph have the same mask, and plans
# its work once. The attention has the input as a sixth source, which upstream's kernels do not look at. The mask's
# `extra` points to it until then, because no struct of a header has to change for that. Where a GPU of this machine
# computes the attention, the input is not part of the graph and costs nothing. Servers get it with the masks, because
# theirs may be our CPU plugin.
# A place is a position. With M-RoPE, where rows of an image share a position, it is the cell's number in its sequence:
# cells are ordered by position, then as their rows are in the image. Without a cache it is the row's number.
# Until: upstream's attention gives a row the same result wherever its cells lie.

set(directory ${LLAMA_SOURCE}/src)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${directory}/llama-graph.cpp
             ${directory}/llama-kv-cache.cpp)
file(READ ${directory}/llama-graph.cpp graph)
file(READ ${directory}/llama-kv-cache.cpp cache)

# The input, beside the masks with a cache and without one.
trio_replace(graph 1 "#include <cassert>" "#include <atomic>\n#include <cassert>")
trio_replace(graph 1 "#include <numeric>" "#include <numeric>\n#include <random>")
trio_replace(graph 1 [=[
static ggml_tensor * build_attn_inp_kq_mask(
]=] [=[
// A number that no other call has returned, probably in no other process either.
int64_t trio_next_number() {
    static std::atomic<int64_t> number{int64_t((uint64_t(std::random_device{}()) << 32 | 1) >> 1)};
    return ++number;
}

static void trio_build_order(ggml_context * ctx, ggml_tensor * mask) {
    ggml_tensor * order = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, mask->ne[0] + mask->ne[1] + 2, mask->ne[3]);
    ggml_set_input(order);
    ggml_set_name(order, "attn_inp_order");
    mask->extra = order;
}

// Whether a backend may compute attention on a CPU: this machine's, or that of a server.
static bool trio_may_be_cpu(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_ACCEL ||
           std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC") == 0;
}

// Whether attention with these keys may be computed on a CPU.
static bool trio_may_be_on_cpu(ggml_backend_sched_t sched, const ggml_tensor * keys) {
    const ggml_tensor * memory = keys->view_src ? keys->view_src : keys;
    if (memory->buffer) {
        const auto device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(memory->buffer));
        return ggml_backend_buffer_is_host(memory->buffer) || (device && trio_may_be_cpu(device));
    }
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        if (!trio_may_be_cpu(ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i)))) {
            return false;
        }
    }
    return true;
}

static ggml_tensor * build_attn_inp_kq_mask(
]=])
trio_replace(graph 1 [=[
    ggml_set_name(res, "attn_inp_kq_mask");

    return res;
}

static bool can_reuse_kq_mask(
]=] [=[
    ggml_set_name(res, "attn_inp_kq_mask");
    trio_build_order(ctx, res);

    return res;
}

static bool can_reuse_kq_mask(
]=])
trio_replace(graph 1 [=[
    cb(inp->self_kq_mask, "self_kq_mask", -1);
]=] [=[
    cb(inp->self_kq_mask, "self_kq_mask", -1);
    trio_build_order(ctx0, inp->self_kq_mask);
]=])
trio_replace(graph 1 [=[
        inp->self_kq_mask_swa = ggml_new_tensor_4d(ctx0, type_mask, n_tokens, n_tokens, 1, 1);
        ggml_set_input(inp->self_kq_mask_swa);
]=] [=[
        inp->self_kq_mask_swa = ggml_new_tensor_4d(ctx0, type_mask, n_tokens, n_tokens, 1, 1);
        ggml_set_input(inp->self_kq_mask_swa);
        trio_build_order(ctx0, inp->self_kq_mask_swa);
]=])
trio_replace(graph 1 [=[
        ggml_flash_attn_ext_add_sinks(cur, sinks);
]=] [=[
        ggml_flash_attn_ext_add_sinks(cur, sinks);
        if (kq_mask && kq_mask->extra && trio_may_be_on_cpu(sched, k)) {
            cur->src[5] = static_cast<ggml_tensor *>(kq_mask->extra);
        }
]=])

# Filling it. Without a cache, the cells are the rows of the batch.
trio_replace(graph 1 [=[
    GGML_ASSERT(self_kq_mask);
    GGML_ASSERT(ggml_backend_buffer_is_host(self_kq_mask->buffer));
]=] [=[
    GGML_ASSERT(self_kq_mask);
    GGML_ASSERT(ggml_backend_buffer_is_host(self_kq_mask->buffer));
    for (const ggml_tensor * mask : { self_kq_mask, self_kq_mask_swa }) {
        const auto * order = mask ? static_cast<ggml_tensor *>(mask->extra) : nullptr;
        if (!order || !order->buffer) {
            continue;
        }
        int32_t * places = static_cast<int32_t *>(order->data);
        std::map<llama_seq_id, int32_t> n_rows;
        for (int64_t i = 0; i < n_tokens; ++i) {
            places[i]        = n_rows[ubatch->seq_id[i][0]]++;
            places[n_kv + i] = ubatch->seq_id[i][0];
        }
        const int64_t number = trio_next_number();
        std::memcpy(places + n_kv + n_tokens, &number, sizeof number);
    }
]=])
trio_replace(cache 1 [=[
void llama_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
]=] [=[
// Numbers the cells of a sequence. Those that share a position are rows of an image, from left to right and downwards.
static void trio_number_cells(const llama_kv_cells & cells, llama_seq_id sequence, int64_t n_kv, int32_t * places) {
    std::vector<std::pair<llama_pos, uint32_t>> order(cells.seq_pos_get(sequence).begin(),
                                                      cells.seq_pos_get(sequence).end());
    for (auto begin = order.begin(); begin != order.end();) {
        const auto is_elsewhere = [&](const auto & cell) { return cell.first != begin->first; };
        const auto end = std::find_if(begin, order.end(), is_elsewhere);
        std::sort(begin, end, [&](const auto & a, const auto & b) {
            const auto & x = cells.ext_get(a.second);
            const auto & y = cells.ext_get(b.second);
            return std::tie(x.y, x.x, a.second) < std::tie(y.y, y.x, b.second);
        });
        begin = end;
    }
    for (size_t i = 0; i < order.size(); ++i) {
        if (order[i].second < n_kv) {
            places[order[i].second] = static_cast<int32_t>(i);
        }
    }
}

int64_t trio_next_number(); // in llama-graph.cpp

static void trio_set_order(const args_set_input_kq_mask & args, int32_t * places) {
    const int64_t number = trio_next_number();
    for (int64_t s = 0; s < args.n_stream; ++s, places += args.n_kv + args.n_tps + 2) {
        llama_seq_id ** sequences = args.ubatch->seq_id + s * args.n_tps;
        const auto & cells = args.v_cells.at(args.seq_to_stream[sequences[0][0]]);
        for (int64_t i = 0; i < args.n_kv; ++i) {
            places[i] = cells.is_empty(i) ? -1 : cells.pos_get(i);
        }
        for (int64_t i = 0; i < args.n_tps; ++i) {
            const llama_seq_id sequence = sequences[i][0];
            if (args.ubatch->is_pos_2d() && (i == 0 || sequence != sequences[i - 1][0])) {
                trio_number_cells(cells, sequence, args.n_kv, places);
            }
            places[args.n_kv + i] = sequence;
        }
        std::memcpy(places + args.n_kv + args.n_tps, &number, sizeof number);
    }
}

void llama_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
]=])
trio_replace(cache 1 [=[
        set_input_kq_mask_impl<float>(args, (float *) dst->data, causal_attn);
    }
]=] [=[
        set_input_kq_mask_impl<float>(args, (float *) dst->data, causal_attn);
    }
    if (const auto * order = static_cast<ggml_tensor *>(dst->extra); order && order->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(order->buffer));
        trio_set_order(args, static_cast<int32_t *>(order->data));
    }
]=])
trio_replace(cache 1 "#include <stdexcept>" "#include <stdexcept>\n#include <tuple>")

set(patched ${CMAKE_BINARY_DIR}/attention_order)
trio_write(${patched}/llama-graph.cpp "${graph}")
trio_write(${patched}/llama-kv-cache.cpp "${cache}")
get_target_property(sources llama SOURCES)
list(REMOVE_ITEM sources llama-graph.cpp llama-kv-cache.cpp)
set_property(TARGET llama PROPERTY SOURCES ${sources} ${patched}/llama-graph.cpp ${patched}/llama-kv-cache.cpp)
# Only for these files: options of the target would compile all of it again. Upstream keeps its files apart, too.
set_source_files_properties(
  ${patched}/llama-graph.cpp ${patched}/llama-kv-cache.cpp TARGET_DIRECTORY llama
  PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON COMPILE_OPTIONS -ffile-prefix-map=${patched}=llama.cpp/src)
