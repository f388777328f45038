# What the selected backends (GGML_...=ON) need of this machine, found as ggml's own CMake files will find it.
# With TRIO_CHECK_ONLY=ON, everything that is missing is reported, in lines that native/build/cmake.py reads.

# Reports that the backend lacks something, unless the condition in the remaining arguments is true. `packages` are the
# Debian packages that have it, if any do.
function(trio_needs backend what packages)
  if(NOT (${ARGN}))
    message(STATUS "trio lacks: ${backend}|${what}|${packages}")
  endif()
endfunction()

# CMake finds a toolkit whose nvcc is on PATH or in /usr/local/cuda, but takes a compiler only from CUDACXX or PATH.
# Here, what one of the two finds is used for the other as well.
if(GGML_CUDA)
  if(NOT "$ENV{CUDACXX}" STREQUAL "" AND NOT CUDAToolkit_ROOT AND NOT CMAKE_CUDA_COMPILER)
    get_filename_component(compiler "$ENV{CUDACXX}" PROGRAM)
    get_filename_component(compiler "${compiler}" DIRECTORY)
    get_filename_component(CUDAToolkit_ROOT "${compiler}" DIRECTORY)
  endif()
  find_package(CUDAToolkit)
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "" AND CUDAToolkit_NVCC_EXECUTABLE)
    set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
  endif()
  # The driver's library is on machines with a driver. To link, a file with its name is enough: toolkits contain one,
  # but not those that come as wheels.
  if(CUDAToolkit_FOUND AND NOT TARGET CUDA::cuda_driver)
    file(WRITE ${CMAKE_BINARY_DIR}/stubs/cuda.c "")
    add_library(trio_cuda_stub SHARED EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/stubs/cuda.c)
    set_target_properties(
      trio_cuda_stub PROPERTIES OUTPUT_NAME cuda NO_SONAME ON LINK_OPTIONS "LINKER:-soname,libcuda.so.1"
                                LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stubs)
    target_link_options(trio_cuda_stub INTERFACE "LINKER:--no-as-needed") # it has no symbols, so the linker would drop it
    add_library(CUDA::cuda_driver ALIAS trio_cuda_stub)
  endif()
endif()

if(NOT TRIO_CHECK_ONLY)
  return()
endif()

if(GGML_VULKAN)
  find_package(Vulkan COMPONENTS glslc)
  if(DEFINED ENV{VULKAN_SDK})
    list(APPEND CMAKE_PREFIX_PATH "$ENV{VULKAN_SDK}")
  endif()
  find_package(SPIRV-Headers CONFIG)
  trio_needs(vulkan "glslc" glslc Vulkan_GLSLC_EXECUTABLE)
  trio_needs(vulkan "vulkan/vulkan.h" libvulkan-dev Vulkan_INCLUDE_DIR)
  trio_needs(vulkan "libvulkan" libvulkan-dev Vulkan_LIBRARY)
  trio_needs(vulkan "the SPIR-V headers" spirv-headers SPIRV-Headers_FOUND)
endif()

if(GGML_CUDA)
  trio_needs(cuda "nvcc (on PATH, or named by CUDACXX or CUDA_PATH)" nvidia-cuda-toolkit CUDAToolkit_FOUND)
  if(CUDAToolkit_FOUND)
    # If there are flags, they may name the header's directory: only the compiler can tell.
    set(flags "${CMAKE_CUDA_FLAGS}$ENV{CUDAFLAGS}$ENV{CPATH}$ENV{CPLUS_INCLUDE_PATH}$ENV{NVCC_PREPEND_FLAGS}")
    find_path(TRIO_CUBLAS_INCLUDE cublas_v2.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    trio_needs(cuda "cublas_v2.h" nvidia-cuda-dev flags OR TRIO_CUBLAS_INCLUDE)
    trio_needs(cuda "libcublas" nvidia-cuda-dev TARGET CUDA::cublas)
  endif()
endif()

if(GGML_METAL)
  trio_needs(metal "macOS" "" APPLE)
endif()

if(GGML_OPENCL)
  find_package(OpenCL)
  trio_needs(opencl "CL/cl.h" opencl-headers OpenCL_INCLUDE_DIR)
  trio_needs(opencl "libOpenCL" ocl-icd-opencl-dev OpenCL_LIBRARY)
endif()

if(GGML_SYCL AND NOT DEFINED ENV{ONEAPI_ROOT})
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-fsycl TRIO_SYCL)
  trio_needs(sycl "a compiler for SYCL (CXX=icpx, of Intel's oneAPI)" "" TRIO_SYCL)
endif()

if(GGML_BLAS)
  set(BLA_VENDOR ${GGML_BLAS_VENDOR})
  if(NOT BLA_VENDOR)
    set(BLA_VENDOR Generic)
    if(APPLE)
      set(BLA_VENDOR Apple)
    endif()
  endif()
  find_package(BLAS)
  trio_needs(blas "a BLAS library" libopenblas-dev BLAS_FOUND)
  if(NOT APPLE AND NOT BLAS_INCLUDE_DIRS)
    find_package(PkgConfig)
    trio_needs(blas "pkg-config" pkgconf PkgConfig_FOUND)
  endif()
endif()

# HIP comes last, because these packages run compilers and may end CMake. A package that was found but cannot be used
# counts as found: the build will say what is wrong with it.
if(GGML_HIP)
  if(EXISTS "$ENV{ROCM_PATH}")
    list(APPEND CMAKE_PREFIX_PATH "$ENV{ROCM_PATH}")
  elseif(EXISTS /opt/rocm)
    list(APPEND CMAKE_PREFIX_PATH /opt/rocm)
  endif()
  set(packages "hipcc libamdhip64-dev")
  foreach(package hip hipblas rocblas)
    find_package(${package} CONFIG QUIET)
    trio_needs(hip "${package}" "${packages}" ${package}_FOUND OR ${package}_CONSIDERED_CONFIGS)
    set(packages "librocblas-dev")
    if(package STREQUAL "hip")
      set(packages "libhipblas-dev")
      trio_needs(hip "version 6.1 of HIP (here it is ${hip_VERSION})" "" NOT hip_VERSION OR NOT hip_VERSION VERSION_LESS 6.1)
    endif()
  endforeach()
endif()
