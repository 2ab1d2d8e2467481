#include "normformer/tensor/thread_pool.h"

#include <stdexcept>

#include <gtest/gtest.h>

namespace normformer {
namespace {

TEST(ThreadPool, RunsEveryIndexOnceWhateverTheNumberOfThreads) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const int64_t n : {0, 1, 7, 1000}) {
      std::vector<int> hits(static_cast<size_t>(n), 0);
      pool.parallel_for(n, 3, [&](int64_t begin, int64_t end) {
        EXPECT_EQ(begin % 3, 0);
        for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
      });
      EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), n);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(pool.parallel_for(100, 1,
                                   [](int64_t begin, int64_t) {
                                     if (begin == 42) throw std::runtime_error("42");
                                   }),
                 std::runtime_error);
    std::atomic<int64_t> sum = 0;
    pool.parallel_for(100, 1, [&](int64_t begin, int64_t) { sum += begin; });
    EXPECT_EQ(sum, 4950);
  }
}

}  // namespace
}  // namespace normformer
