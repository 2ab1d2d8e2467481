# What the mpiexec found needs to start more ranks than there are cores, several programs side by side.
execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE nf_mpiexec_version ERROR_QUIET)
set(nf_mpiexec_flags)
set(nf_mpiexec_environment)
if(nf_mpiexec_version MATCHES "Open MPI|OpenRTE")
  # Open MPI binds two ranks to two cores, always the first two.
  set(nf_mpiexec_flags --oversubscribe --bind-to none)
  execute_process(COMMAND id -u OUTPUT_VARIABLE nf_user OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(nf_user STREQUAL "0")
    set(nf_mpiexec_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
  endif()
endif()

# nf_add_mpi_test(<name> SOURCES ... RANKS 1 2 4 [LIBS ...] [TIMEOUT s] [WATCHDOG s] [LABELS ...])
# One GoogleTest program under mpiexec, one ctest entry for each number of ranks: <name>.np<N>. A test that
# runs longer than WATCHDOG (half of TIMEOUT) seconds is named and ends the job.
function(nf_add_mpi_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT;WATCHDOG" "SOURCES;RANKS;LIBS;LABELS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_SOURCES OR NOT arg_RANKS)
    message(FATAL_ERROR "nf_add_mpi_test(${name}): bad arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  if(NOT arg_WATCHDOG)
    math(EXPR arg_WATCHDOG "${arg_TIMEOUT} / 2")
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE normformer_mpi_gtest_main ${arg_LIBS})
  foreach(np IN LISTS arg_RANKS)
    add_test(NAME ${name}.np${np}
             COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${np} ${nf_mpiexec_flags} ${MPIEXEC_PREFLAGS}
                     $<TARGET_FILE:${name}> ${MPIEXEC_POSTFLAGS})
    set_tests_properties(${name}.np${np} PROPERTIES
                         PROCESSORS ${np} TIMEOUT ${arg_TIMEOUT} LABELS "mpi;np${np};${arg_LABELS}"
                         ENVIRONMENT "NORMFORMER_TEST_WATCHDOG=${arg_WATCHDOG};${nf_mpiexec_environment}")
  endforeach()
endfunction()
