#include "normformer/training/agreement.h"

#include <gtest/gtest.h>

namespace normformer {
namespace {

TEST(RunAgreed, OneRanksFailureIsEverybodysWithItsCode) {
  run_local_world(3, [](const Group& world) {
    try {
      run_agreed(world, [&] {
        if (world.rank() == 1) throw DataError("corpus.idx is truncated");
      });
      ADD_FAILURE() << "rank " << world.rank() << " went on";
    } catch (const AgreedError& e) {
      EXPECT_STREQ(e.what(), "corpus.idx is truncated");
      EXPECT_EQ(e.exit_code(), ExitCode::bad_data);
    }
  });
}

TEST(RunAgreed, EqualMessagesAreSaidOnce) {
  run_local_world(3, [](const Group& world) {
    try {
      run_agreed(world, [] { throw ConfigError("model.heads must divide model.width"); });
      ADD_FAILURE() << "did not throw";
    } catch (const AgreedError& e) {
      EXPECT_STREQ(e.what(), "model.heads must divide model.width");
    }
  });
}

TEST(RunAgreed, SuccessGoesOn) {
  run_local_world(2, [](const Group& world) { EXPECT_NO_THROW(run_agreed(world, [] {})); });
}

}  // namespace
}  // namespace normformer
