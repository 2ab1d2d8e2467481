#include "normformer/core/error.h"

#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace normformer {
namespace {

TEST(Error, CheckNamesThePlaceAndTheCondition) {
  try {
    NF_CHECK(1 == 2, "one is {}", 1);
    FAIL() << "did not throw";
  } catch (const LogicError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("error_test.cpp"));
    EXPECT_THAT(e.what(), testing::HasSubstr("one is 1"));
    EXPECT_THAT(e.what(), testing::HasSubstr("1 == 2"));
  }
}

TEST(Error, EachThreadHasItsOwnRankLabel) {
  std::string seen;
  std::thread([&] {
    set_rank_label(3, "node7");
    try {
      throw DataError("no such token");
    } catch (...) {
      seen = describe_current_exception();
      EXPECT_EQ(current_exception_exit_code(), ExitCode::bad_data);
    }
  }).join();
  EXPECT_EQ(seen, "[rank 3 host node7] no such token");
  EXPECT_EQ(rank_prefix(), "");
}

}  // namespace
}  // namespace normformer
