# A graph is allocated again if the plan of the last one does not suit its leafs. Upstream compares only nodes.
#
# Why: two graphs may have as many nodes and leafs as each other, and list their leafs in another order. Upstream then
# allocates an input where the plan has a weight, which has memory of its own, and reads outside of an array. It happens
# to hybrid models (LFM2): a batch of a prompt that gives no output, after a batch of embeddings, ended the process.
# Until: ggml_gallocr_needs_realloc looks at the leafs.

set(directory ${LLAMA_SOURCE}/ggml/src)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${directory}/ggml-alloc.c)
file(READ ${directory}/ggml-alloc.c allocator)
trio_replace(allocator 1 [=[
    for (int i = 0; i < graph->n_nodes; i++) {
        struct ggml_tensor * node = graph->nodes[i];
        struct node_alloc * node_alloc = &galloc->node_allocs[i];

        if (]=] [=[
    for (int i = 0; i < graph->n_leafs; i++) {
        struct ggml_tensor * leaf = graph->leafs[i];
        struct tensor_alloc * planned = &galloc->leaf_allocs[i].leaf;
        const bool has_memory = leaf->data != NULL || leaf->view_src != NULL;
        // despite its name, the function says whether the tensor fits
        if (has_memory != (planned->buffer_id < 0) || !ggml_gallocr_node_needs_realloc(galloc, leaf, planned)) {
            return true;
        }
    }

    for (int i = 0; i < graph->n_nodes; i++) {
        struct ggml_tensor * node = graph->nodes[i];
        struct node_alloc * node_alloc = &galloc->node_allocs[i];

        if (]=])
set(patched ${CMAKE_BINARY_DIR}/allocator)
trio_write(${patched}/ggml-alloc.c "${allocator}")
get_target_property(sources ggml-base SOURCES)
list(REMOVE_ITEM sources ggml-alloc.c)
set_property(TARGET ggml-base PROPERTY SOURCES ${sources} ${patched}/ggml-alloc.c)
target_compile_options(ggml-base PRIVATE -ffile-prefix-map=${patched}=ggml-alloc)
