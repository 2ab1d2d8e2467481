# nf_add_room(<room> SOURCES ... [DEPENDS <room> ...] [LIBS <target> ...] [PRIVATE_LIBS <target> ...])
# One static library normformer_<room>. DEPENDS names rooms on a lower floor.
# nf_add_cuda_sources(<room> SOURCES ...) adds what needs CUDA (NormformerCuda.cmake).
function(nf_add_room room)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;DEPENDS;LIBS;PRIVATE_LIBS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES)
    message(FATAL_ERROR "nf_add_room(${room}): bad arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  add_library(normformer_${room} STATIC ${arg_SOURCES})
  list(TRANSFORM arg_DEPENDS PREPEND normformer_)
  target_link_libraries(normformer_${room} PUBLIC normformer_options ${arg_DEPENDS} ${arg_LIBS}
                        PRIVATE ${arg_PRIVATE_LIBS})
endfunction()

# nf_add_test(<name> SOURCES ... [LIBS ...] [TIMEOUT s] [LABELS ...])
# One GoogleTest program in one process; links the rooms and libraries named in LIBS.
function(nf_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT" "SOURCES;LIBS;LABELS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES)
    message(FATAL_ERROR "nf_add_test(${name}): bad arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE normformer_options GTest::gtest_main GTest::gmock ${arg_LIBS})
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT} LABELS "unit;${arg_LABELS}")
endfunction()
