#pragma once

#include "normformer/comm/group.h"

namespace normformer::testing {

/// The session of an MPI test program, for tests linked with normformer_mpi_gtest_main. Every rank runs every
/// test. Use EXPECT_* for values of one rank and ASSERT_* only for values equal on all: a rank that leaves a
/// test early leaves the others waiting, until the watchdog ends them all.
MpiSession& mpi_session();

/// All ranks of the test program.
inline const Group& mpi_world() { return mpi_session().world(); }

}  // namespace normformer::testing
