#include "ops/cuda/product_plan.h"

#include <gtest/gtest.h>

namespace normformer::ops::cuda {
namespace {

TEST(ProductPlan, AnAlgorithmReadsBackFromItsText) {
  cublasLtMatmulAlgo_t algorithm{};
  for (size_t i = 0; i < std::size(algorithm.data); ++i) algorithm.data[i] = 0x0123456789abcdefULL << (4 * i);
  const std::string text = text_of(algorithm);
  const auto read = algorithm_of(text);
  ASSERT_TRUE(read.has_value());
  EXPECT_TRUE(std::equal(std::begin(algorithm.data), std::end(algorithm.data), std::begin(read->data)));
  for (const std::string& bad : {std::string(), std::string("1 2 3"), text + " ", text + "0", text.substr(1),
                                 " " + text.substr(1), "x" + text.substr(1), "A" + text.substr(1)}) {
    EXPECT_FALSE(algorithm_of(bad).has_value()) << bad;
  }
}

TEST(Operands, AlignmentIsThatOfEachAddress) {
  const auto address = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
  const Operands operands{address(4096), address(4096 + 16), nullptr, address(4096 + 258)};
  EXPECT_EQ(operands.alignments(), (std::array<uint32_t, 4>{256, 16, 2, 256}));
}

}  // namespace
}  // namespace normformer::ops::cuda
