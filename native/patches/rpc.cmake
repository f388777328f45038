# The RPC plugin is compiled from a patched copy of its source, made here. Each included file is one patch.
#
# Order matters: a patch counts how often it finds its text, and an earlier one may have replaced some of it.

set(directory ${LLAMA_SOURCE}/ggml/src/ggml-rpc)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${directory}/ggml-rpc.cpp ${directory}/transport.cpp
             ${directory}/transport.h)
file(READ ${directory}/ggml-rpc.cpp rpc)
file(READ ${directory}/transport.h header)
file(READ ${directory}/transport.cpp transport)

include(${CMAKE_CURRENT_LIST_DIR}/rpc_lost_server.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rpc_destructors.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rpc_handshake.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rpc_graphs.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/rpc_timeouts.cmake)

set(patched ${CMAKE_BINARY_DIR}/rpc)
trio_write(${patched}/rpc.cpp "${rpc}")
trio_write(${patched}/transport.cpp "${transport}")
trio_write(${patched}/transport.h "${header}")
set_property(TARGET ggml-rpc PROPERTY SOURCES ${patched}/rpc.cpp ${patched}/transport.cpp)
target_include_directories(ggml-rpc PRIVATE ${directory})
target_compile_options(ggml-rpc PRIVATE -ffile-prefix-map=${patched}=ggml-rpc)
