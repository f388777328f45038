# Our products (matmul.cpp) go into every variant of the CPU plugin, and are asked first who computes a node.
#
# Why: matmul.cpp says why it exists, and how ggml's "extra buffer types" let it claim operations. traits.cpp gets its
# list of them from us; loading, in ggml-cpu.cpp, keeps upstream's, which would repack weights: trio_model_open says no.
# And ggml-cpu.c is compiled together with a function that looks into its thread pool, because upstream asks only
# between two nodes whether a graph is aborted.
# Until: upstream's products are as quick, and give a row the same result in any company.

set(cpu ${LLAMA_SOURCE}/ggml/src/ggml-cpu)
get_property(targets DIRECTORY ${LLAMA_SOURCE}/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
foreach(target ${targets})
  if(target MATCHES "^ggml-cpu" AND NOT target MATCHES "-feats$")
    get_target_property(sources ${target} SOURCES)
    list(REMOVE_ITEM sources ggml-cpu/ggml-cpu.c ${cpu}/ggml-cpu.c)
    set_property(TARGET ${target} PROPERTY SOURCES ${sources} ${CMAKE_CURRENT_LIST_DIR}/matmul_abort.c
                 ${CMAKE_CURRENT_SOURCE_DIR}/matmul.cpp)
    set_source_files_properties(
      ${cpu}/traits.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_DEFINITIONS ggml_backend_cpu_get_extra_buffer_types=ggml_cpu_operation_owners)
    # Each result must be the same chain of roundings in every kernel that the compiler makes of one text.
    set_source_files_properties(
      ${CMAKE_CURRENT_SOURCE_DIR}/matmul.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
  endif()
endforeach()
