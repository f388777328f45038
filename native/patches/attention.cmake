# Our attention (attention.cpp) goes into every variant of the CPU plugin, and upstream's function gets another name.
#
# Why: attention.cpp says why it exists. It calls upstream's function for everything that it does not know.
# Until: upstream's kernel for a few rows is as quick, and gives a row the same result in any company.

get_property(targets DIRECTORY ${LLAMA_SOURCE}/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
foreach(target ${targets})
  if(target MATCHES "^ggml-cpu" AND NOT target MATCHES "-feats$")
    target_sources(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/attention.cpp)
    set_source_files_properties(
      ${LLAMA_SOURCE}/ggml/src/ggml-cpu/ops.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_DEFINITIONS ggml_compute_forward_flash_attn_ext=ggml_flash_attn_ext_upstream)
    # A function that is inlined in two places must round the same in both.
    set_source_files_properties(
      ${CMAKE_CURRENT_SOURCE_DIR}/attention.cpp TARGET_DIRECTORY ${target}
      PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
  endif()
endforeach()
