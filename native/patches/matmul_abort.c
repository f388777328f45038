// ggml-cpu.c, and one function more that needs to see its thread pool. matmul.cmake says why.

#include "ggml-cpu.c"

bool ggml_cpu_is_abort_wanted(struct ggml_threadpool * threadpool);

// Whether the graph that is being computed is to be aborted. Any thread of it may ask.
bool ggml_cpu_is_abort_wanted(struct ggml_threadpool * threadpool) {
    const struct ggml_cplan * plan = threadpool->cplan;
    return plan->abort_callback != NULL && plan->abort_callback(plan->abort_callback_data);
}
