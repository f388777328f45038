# The Vulkan plugin builds with Debian 12's headers, loader and shader compiler.
#
# Why: vulkan_compat.h and vulkan_compat.cpp say what the headers and the loader lack. And a shader that glslc is too
# old for becomes an empty file without a list of what it depends on: Ninja would make it again in every build. So that
# list is written beforehand.
# Until: Debian 12 need not be supported. vkUpdateDescriptorSets in vulkan_compat.cpp may be needed longer: it says so.

target_sources(ggml-vulkan PRIVATE ${CMAKE_CURRENT_LIST_DIR}/vulkan_compat.cpp)
set_source_files_properties( # it includes a header of ggml's own
  ${CMAKE_CURRENT_LIST_DIR}/vulkan_compat.cpp TARGET_DIRECTORY ggml-vulkan
  PROPERTIES INCLUDE_DIRECTORIES "${LLAMA_SOURCE}/ggml/src;${LLAMA_SOURCE}/ggml/src/ggml-vulkan")
target_compile_options(
  ggml-vulkan PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/vulkan_compat.h>")
get_target_property(directory ggml-vulkan BINARY_DIR)
file(GLOB shaders ${LLAMA_SOURCE}/ggml/src/ggml-vulkan/vulkan-shaders/*.comp)
foreach(shader ${shaders})
  get_filename_component(name ${shader} NAME)
  if(NOT EXISTS ${directory}/${name}.cpp.d)
    file(WRITE ${directory}/${name}.cpp.d "${directory}/${name}.cpp: ${shader}\n")
  endif()
endforeach()
