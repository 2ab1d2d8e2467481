# nf_add_room(<room> SOURCES ... [DEPENDS <room> ...] [LIBS <target> ...] [PRIVATE_LIBS <target> ...])
# One static library normformer_<room>. DEPENDS names rooms on a lower floor.
# nf_add_cuda_sources(<room> SOURCES ...) adds what needs CUDA (NormformerCuda.cmake).
function(nf_add_room room)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;DEPENDS;LIBS;PRIVATE_LIBS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES)
    message(FATAL_ERROR "nf_add_room(${room}): bad arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  add_library(normformer_${room} STATIC ${arg_SOURCES})
  # Loops are written to be vectorised; -O2 of GCC 12 leaves most of them alone.
  target_compile_options(normformer_${room} PRIVATE
                         "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:RelWithDebInfo,Release>>:-O3>")
  list(TRANSFORM arg_DEPENDS PREPEND normformer_)
  target_link_libraries(normformer_${room} PUBLIC normformer_options ${arg_DEPENDS} ${arg_LIBS}
                        PRIVATE ${arg_PRIVATE_LIBS})
endfunction()

# nf_add_test(<name> SOURCES ... [LIBS ...] [TIMEOUT s] [COST s] [LABELS ...] [ANY_DEVICE])
# One GoogleTest program in one process; links the rooms and libraries named in LIBS. ANY_DEVICE: its tests compute on
# test_device() (tests/support), and a build with CUDA runs them once more on the GPU, as <name>.cuda. EMULATED_FILTER:
# which of them (GoogleTest's filter) where the GPU is emulated, and so slow; TSAN_FILTER: which of them under
# ThreadSanitizer, slow too, without those that compute many more shapes in the way that others do. Tests of high COST
# start first.
function(nf_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "ANY_DEVICE" "TIMEOUT;COST;EMULATED_FILTER;TSAN_FILTER" "SOURCES;LIBS;LABELS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES)
    message(FATAL_ERROR "nf_add_test(${name}): bad arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  # For what hangs, not for what is slow: sanitizers on a busy machine may take minutes over the largest tests.
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 1200)
  endif()
  if(NOT arg_COST)
    set(arg_COST 0)
  endif()
  add_executable(${name} ${arg_SOURCES})
  set(main GTest::gtest_main)
  if(arg_ANY_DEVICE)
    set(main normformer_device_gtest_main)
  endif()
  target_link_libraries(${name} PRIVATE normformer_options ${main} GTest::gmock ${arg_LIBS})
  set(filter)
  if(arg_TSAN_FILTER AND CMAKE_CXX_FLAGS MATCHES "-fsanitize=thread")
    set(filter --gtest_filter=${arg_TSAN_FILTER})
  endif()
  add_test(NAME ${name} COMMAND ${name} ${filter})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT} COST ${arg_COST} LABELS "unit;${arg_LABELS}")
  if(arg_ANY_DEVICE AND NORMFORMER_CUDA)
    set(filter)
    if(NORMFORMER_CUDA STREQUAL "EMULATED" AND arg_EMULATED_FILTER)
      set(filter --gtest_filter=${arg_EMULATED_FILTER})
    endif()
    add_test(NAME ${name}.cuda COMMAND ${name} ${filter})
    set_tests_properties(${name}.cuda PROPERTIES TIMEOUT 1200 COST ${arg_COST} LABELS device SKIP_RETURN_CODE 77
                         ENVIRONMENT NORMFORMER_TEST_DEVICE=cuda)
  endif()
endfunction()
