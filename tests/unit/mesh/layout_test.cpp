#include "normformer/mesh/layout.h"

#include <numeric>

#include <gtest/gtest.h>

namespace normformer {
namespace {

// `shard(total, degree, rank)` must cover [0, total) in rank order, by pieces that differ by at most one and
// do not grow.
template <class Shard>
void expect_even_cover(Shard shard) {
  for (int64_t total = 0; total <= 67; ++total) {
    for (int64_t degree = 1; degree <= 11; ++degree) {
      int64_t end = 0;
      int64_t smallest = total;
      int64_t last = total;
      for (int64_t rank = 0; rank < degree; ++rank) {
        const Range held = shard(total, degree, rank);
        ASSERT_EQ(held.begin, end) << total << " over " << degree;
        ASSERT_LE(held.size(), last) << total << " over " << degree;
        end = held.end;
        last = held.size();
        smallest = std::min(smallest, held.size());
      }
      ASSERT_EQ(end, total) << total << " over " << degree;
      ASSERT_LE(shard(total, degree, 0).size() - smallest, 1) << total << " over " << degree;
    }
  }
}

TEST(Layout, ContextPartsCoverASequenceAndAscend) {
  for (int64_t length = 0; length <= 29; ++length) {
    for (int64_t degree = 1; degree <= 5; ++degree) {
      std::vector<int> held(static_cast<size_t>(length));
      for (int64_t rank = 0; rank < degree; ++rank) {
        const SequencePart part = context_part(length, degree, rank);
        int64_t before = -1;
        for (int64_t row = 0; row < part.size(); ++row) {
          const int64_t position = part.position_of(row);
          ASSERT_GT(position, before);
          ASSERT_EQ(part.rows_before(position), row);
          ASSERT_EQ(part.rows_before(position + 1), row + 1);
          before = position;
          held[static_cast<size_t>(position)] += 1;
        }
        EXPECT_EQ(part.rows_before(0), 0);
        EXPECT_EQ(part.rows_before(length), part.size());
        EXPECT_GE(part.size(), length >= 2 * degree ? 2 : 0);
      }
      EXPECT_EQ(held, std::vector<int>(static_cast<size_t>(length), 1)) << length << " over " << degree;
    }
  }
  EXPECT_EQ(context_part(9, 1, 0), SequencePart::whole(9));
  EXPECT_EQ(context_part(16, 2, 1), (SequencePart{{4, 8}, {8, 12}}));
}

TEST(Layout, ShardsCoverEvenlyInRankOrder) {
  expect_even_cover(head_shard);
  expect_even_cover(feature_shard);
  expect_even_cover(vocabulary_shard);
  expect_even_cover(bucket_shard);
  expect_even_cover(replica_samples);
}

TEST(Layout, KnownShards) {
  // 7 heads over 3: 3, 2, 2.
  EXPECT_EQ(head_shard(7, 3, 0), (Range{0, 3}));
  EXPECT_EQ(head_shard(7, 3, 2), (Range{5, 7}));
  EXPECT_EQ(head_channel_shard(7, 64, 3, 1), (Range{192, 320}));
  // GPT-2's vocabulary over 4.
  EXPECT_EQ(vocabulary_shard(50257, 4, 0), (Range{0, 12565}));
  EXPECT_EQ(vocabulary_shard(50257, 4, 3), (Range{37693, 50257}));
  // More elements than an int counts.
  EXPECT_EQ(bucket_shard(int64_t{5'000'000'001}, 2, 1), (Range{2'500'000'001, 5'000'000'001}));
}

TEST(Layout, HeadChannelsAreWholeHeads) {
  for (int64_t heads = 0; heads <= 20; ++heads) {
    for (int64_t degree = 1; degree <= 7; ++degree) {
      for (int64_t rank = 0; rank < degree; ++rank) {
        const Range held = head_shard(heads, degree, rank);
        EXPECT_EQ(head_channel_shard(heads, 24, degree, rank), (Range{held.begin * 24, held.end * 24}));
      }
    }
  }
}

TEST(Layout, ShardSizesAreThoseOfTheShards) {
  EXPECT_EQ(shard_sizes(11, 4), (std::vector<int64_t>{3, 3, 3, 2}));
  EXPECT_EQ(shard_sizes(1, 3), (std::vector<int64_t>{1, 0, 0}));
  EXPECT_EQ(shard_sizes(0, 2), (std::vector<int64_t>{0, 0}));
}

TEST(Layout, KnownMicroBatches) {
  // 7 samples over 2 replicas in twos: the first has 2, 2; the second 2, 1.
  EXPECT_EQ(micro_batches(7, 2, 2, 0), (std::vector<Range>{{0, 2}, {2, 4}}));
  EXPECT_EQ(micro_batches(7, 2, 2, 1), (std::vector<Range>{{4, 6}, {6, 7}}));
  // 5 over 2 in ones: the second replica's third micro-batch is empty.
  EXPECT_EQ(micro_batches(5, 1, 2, 0), (std::vector<Range>{{0, 1}, {1, 2}, {2, 3}}));
  EXPECT_EQ(micro_batches(5, 1, 2, 1), (std::vector<Range>{{3, 4}, {4, 5}, {5, 5}}));
  // Fewer samples than replicas.
  EXPECT_EQ(micro_batches(1, 4, 3, 2), (std::vector<Range>{{1, 1}}));
}

TEST(Layout, MicroBatchesTakeEverySampleOnceAndAreAsManyEverywhere) {
  for (int64_t samples = 0; samples <= 41; ++samples) {
    for (int64_t micro_batch = 1; micro_batch <= 6; ++micro_batch) {
      for (int64_t degree = 1; degree <= 7; ++degree) {
        int64_t end = 0;
        const size_t number = micro_batches(samples, micro_batch, degree, 0).size();
        for (int64_t rank = 0; rank < degree; ++rank) {
          const std::vector<Range> cut = micro_batches(samples, micro_batch, degree, rank);
          ASSERT_EQ(cut.size(), number);
          for (const Range& part : cut) {
            ASSERT_EQ(part.begin, end);
            ASSERT_GE(part.size(), 0);
            ASSERT_LE(part.size(), micro_batch);
            end = part.end;
          }
          if (rank == 0 && number > 0) {
            ASSERT_FALSE(cut.back().empty());
          }
        }
        ASSERT_EQ(end, samples);
      }
    }
  }
}

TEST(Layout, MicroBatchesOfNothingAreRefused) {
  EXPECT_THROW(micro_batches(8, 0, 1, 0), LogicError);
  EXPECT_THROW(micro_batches(8, 1, 2, 2), LogicError);
}

}  // namespace
}  // namespace normformer
