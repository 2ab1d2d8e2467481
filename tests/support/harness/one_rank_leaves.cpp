#include <gtest/gtest.h>

#include "support/mpi_world.h"

using normformer::testing::mpi_world;

TEST(OneRank, LeavesBeforeACollective) {
  ASSERT_NE(mpi_world().rank(), 1);
  mpi_world().barrier();
}
