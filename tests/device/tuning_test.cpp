#include "ops/cuda/tuning.h"

#include <cstdlib>
#include <filesystem>

#include <gtest/gtest.h>
#include <unistd.h>

#include "normformer/tensor/context.h"

namespace normformer::ops::cuda {
namespace {

class FasterWayTest : public testing::Test {
 protected:
  void SetUp() override {
    if (list_gpus().empty()) GTEST_SKIP() << describe_cuda();
    folder_ = std::filesystem::temp_directory_path() / fmt::format("normformer_tuning_{}", getpid());
    setenv("NORMFORMER_CACHE", folder_.c_str(), 1);
    context_.emplace(DeviceKind::cuda);
    some_ = context_->zeros({1 << 20}, DType::f32);
  }
  void TearDown() override {
    unsetenv("NORMFORMER_CACHE");
    std::filesystem::remove_all(folder_);
  }

  // Many kernels, and hardly any.
  void go_slowly() {
    ++slow_;
    for (int i = 0; i < 50; ++i) scale(*context_, some_, 1.0);
  }
  void go_fast() {
    ++fast_;
    scale(*context_, some_.flat(0, 1), 1.0);
  }

  std::filesystem::path folder_;
  std::optional<Context> context_;
  Tensor some_;
  int slow_ = 0;
  int fast_ = 0;
};

TEST_F(FasterWayTest, IsFoundOnceAndKept) {
  context_->gpu().tune_products(true);
  const auto slowly = [&] {
    go_slowly();
    return true;
  };
  FasterWay ways(context_->gpu(), "test 1");
  ways.run("a", slowly, [&] { go_fast(); });
  const int tried = slow_;
  EXPECT_GT(tried, 1);
  fast_ = 0;
  ways.run("a", slowly, [&] { go_fast(); });
  EXPECT_EQ(slow_, tried);
  EXPECT_EQ(fast_, 1);

  // A later run chooses alike without timing: it goes the first way once, to see whether it can, and then the
  // other.
  FasterWay later(context_->gpu(), "test 1");
  later.run("a", slowly, [&] { go_fast(); });
  EXPECT_EQ(slow_, tried + 1);
  EXPECT_EQ(fast_, 2);
}

TEST_F(FasterWayTest, IsTheFirstWithoutTuningAndTheSecondWhereTheFirstCannotGo) {
  FasterWay ways(context_->gpu(), "test 2");
  for (int i = 0; i < 2; ++i) {
    ways.run(
        "a",
        [&] {
          go_slowly();
          return true;
        },
        [&] { go_fast(); });
    ways.run(
        "b", [] { return false; }, [&] { go_fast(); });
  }
  EXPECT_EQ(slow_, 2);
  EXPECT_EQ(fast_, 2);
  EXPECT_FALSE(std::filesystem::exists(folder_));
}

}  // namespace
}  // namespace normformer::ops::cuda
