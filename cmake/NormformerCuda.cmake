# Defines normformer_cuda_runtime, what sources that call CUDA link, by NORMFORMER_CUDA:
#   ON        NVIDIA's toolkit; .cu files are compiled by nvcc for CMAKE_CUDA_ARCHITECTURES.
#   EMULATED  tests/simt: .cu files are compiled as C++ and their kernels run on the host, each thread on a fiber.
#   OFF       nothing.
if(NORMFORMER_CUDA STREQUAL "EMULATED")
  add_subdirectory(tests/simt)
  add_library(normformer_cuda_runtime ALIAS normformer_simt)
elseif(NORMFORMER_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit 12.4 REQUIRED)
  # CMake 3.25 does not know that nvcc 13 reads C++20. Public functions that are constexpr run on the device as well.
  target_compile_options(
    normformer_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra;$<$<BOOL:${NORMFORMER_WERROR}>:-Werror=all-warnings>>")
  add_library(normformer_cuda_runtime INTERFACE)
  target_link_libraries(normformer_cuda_runtime INTERFACE CUDA::cudart_static)
endif()

# nf_add_cuda_sources(<room> SOURCES ... [LIBS ...])
# Adds sources that need CUDA to a room; nothing where NORMFORMER_CUDA is OFF.
function(nf_add_cuda_sources room)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;LIBS")
  if(NOT NORMFORMER_CUDA)
    return()
  endif()
  target_sources(normformer_${room} PRIVATE ${arg_SOURCES})
  target_link_libraries(normformer_${room} PRIVATE normformer_cuda_runtime ${arg_LIBS})
  if(NORMFORMER_CUDA STREQUAL "EMULATED")
    set(kernels ${arg_SOURCES})
    list(FILTER kernels INCLUDE REGEX "[.]cu$")
    set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  endif()
endfunction()
