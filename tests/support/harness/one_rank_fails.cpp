#include <gtest/gtest.h>

#include "support/mpi_world.h"

using normformer::testing::mpi_world;

TEST(OneRank, TheLastOneFails) {
  EXPECT_NE(mpi_world().rank(), mpi_world().size() - 1);
  mpi_world().barrier();
}

TEST(OneRank, TheNextTestStillRuns) { mpi_world().barrier(); }
