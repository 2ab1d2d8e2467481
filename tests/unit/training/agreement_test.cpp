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

TEST(RequireSame, NamesTheFirstRankThatDiffersAndHow) {
  run_local_world(3, [](const Group& world) {
    EXPECT_NO_THROW(require_same(world, "configuration", "a = 1\nb = 2\n"));
    for (const auto& [mine, difference] : {std::pair("a = 1\nb = 3\n", "'b = 3' and 'b = 2'"),
                                           std::pair("a = 1\n", "'nothing' and 'b = 2'")}) {
      try {
        require_same(world, "configuration", world.rank() == 0 ? "a = 1\nb = 2\n" : mine);
        ADD_FAILURE() << "rank " << world.rank() << " went on";
      } catch (const AgreedError& e) {
        const std::string host = host_name();
        EXPECT_EQ(e.what(), fmt::format("rank 1 on {} has another configuration than rank 0 on {}: {}", host,
                                        host, difference));
        EXPECT_EQ(e.exit_code(), ExitCode::bad_usage);
      }
    }
  });
}

}  // namespace
}  // namespace normformer
