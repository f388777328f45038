// Edits of the KV cache, between steps.

#include "context.h"

#include <algorithm>

using namespace trio;

namespace {

void check_range(const trio_context &context, int32_t start, int32_t end) {
    check(start >= 0 && start <= context.info.n_ctx, "start is out of range");
    check(end == -1 || (end >= start && end <= context.info.n_ctx), "end is out of range");
}

} // namespace

extern "C" {

int32_t trio_seq_remove(trio_context *context, int32_t seq, int32_t start, int32_t end) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        check_range(*context, start, end);
        if (!context->info.has_memory || start == end) return 1;
        if (context->loses_cells && start > 0 && start <= context->last_position(seq)) return 0;
        return int32_t(context->remove(seq, start, end));
    });
}

int32_t trio_seq_copy(trio_context *context, int32_t source, int32_t target, int32_t start, int32_t end) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(source);
        context->check_seq(target);
        check_range(*context, start, end);
        check(context->info.has_memory != 0, "nothing is kept between steps");
        check(source != target, "source and target are the same sequence");
        check(!(context->is_recurrent || context->loses_cells) ||
                  (start == 0 && (end == -1 || end > context->last_position(source))),
              "this kind of memory can only be copied whole");
        if (start == end) return TRIO_OK;
        llama_memory_seq_cp(context->memory, source, target, start, end);
        if (context->has_shadows) {
            llama_memory_seq_cp(context->memory, context->shadow(source), context->shadow(target), start, end);
        }
        return TRIO_OK;
    });
}

int32_t trio_seq_add(trio_context *context, int32_t seq, int32_t start, int32_t end, int32_t delta) {
    return guard_context(context, [&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        check_range(*context, start, end);
        check(context->info.can_shift != 0, "positions cannot be renumbered in this kind of memory");
        const int32_t n_ctx = context->info.n_ctx;
        check(delta >= -n_ctx && delta <= n_ctx, "delta is out of range");
        check(start + delta >= 0 && (end == -1 ? n_ctx : end) + std::max(delta, 0) <= n_ctx,
              "renumbered positions would be out of range");
        if (start != end && delta != 0) {
            llama_memory_seq_add(context->memory, seq, start, end, delta);
            context->shift_pending = true;
        }
        return TRIO_OK;
    });
}

int32_t trio_seq_range(const trio_context *context, int32_t seq, int32_t *first, int32_t *last) {
    return guard([&] {
        check_pointer(context, "context")->check_alive();
        context->check_seq(seq);
        check_pointer(first, "first");
        check_pointer(last, "last");
        *first = context->info.has_memory ? llama_memory_seq_pos_min(context->memory, seq) : -1;
        *last = context->info.has_memory ? llama_memory_seq_pos_max(context->memory, seq) : -1;
        return TRIO_OK;
    });
}

} // extern "C"
