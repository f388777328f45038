# The CPU plugin for AMX is offered only where the operating system lets programs use AMX.
#
# Why: ggml scores a plugin by cpuid alone. On a virtual machine that has AMX in cpuid but does not allow it, it took
# the variant sapphirerapids, which was ended by an illegal instruction. With a score of 0, the next best is taken.
# Until: ggml_backend_cpu_x86_score asks the operating system (it has a FIXME that says so).

set(features ${LLAMA_SOURCE}/ggml/src/ggml-cpu/arch/x86/cpu-feats.cpp)
set(patched ${CMAKE_BINARY_DIR}/amx)
get_property(targets DIRECTORY ${LLAMA_SOURCE}/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
foreach(target ${targets})
  if(target MATCHES "^ggml-cpu-.*-feats$")
    get_target_property(definitions ${target} COMPILE_DEFINITIONS)
    if("GGML_AMX_INT8" IN_LIST definitions)
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${features})
      file(READ ${features} score)
      trio_replace(score 1 "#include \"ggml-backend-impl.h\"\n"
                   "#include \"ggml-backend-impl.h\"\n#include \"tile_registers.h\"\n")
      trio_replace(score 1 "if (!is.AMX_INT8()) { return 0; }"
                   "if (!is.AMX_INT8() || !trio::may_use_tiles()) { return 0; }")
      trio_write(${patched}/cpu-feats.cpp "${score}")
      set_property(TARGET ${target} PROPERTY SOURCES ${patched}/cpu-feats.cpp)
      target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
    endif()
  endif()
endforeach()
