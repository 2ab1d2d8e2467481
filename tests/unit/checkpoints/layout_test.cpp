#include "layout.h"

#include <map>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/philox.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;

/// Row and column of every element of a place, in its order, one by one.
std::vector<std::pair<int64_t, int64_t>> elements_of(const PiecePlace& place) {
  std::vector<std::pair<int64_t, int64_t>> elements;
  const Rectangle& r = place.rectangle;
  int64_t index = 0;
  for (int64_t row = r.rows.begin; row < r.rows.end; ++row) {
    for (int64_t column = r.columns.begin; column < r.columns.end; ++column, ++index) {
      if (place.range.contains(index)) elements.emplace_back(row, column);
    }
  }
  return elements;
}

/// A place in a [5, 4] matrix.
PiecePlace random_place(uint32_t trial, uint32_t which) {
  const auto r = philox4x32({trial, which, 0, 0}, {1, 0});
  const auto s = philox4x32({trial, which, 1, 0}, {1, 0});
  const int64_t row = r[0] % 5;
  const int64_t column = r[1] % 4;
  PiecePlace place{{{row, row + 1 + r[2] % (5 - row)}, {column, column + 1 + r[3] % (4 - column)}, 5, 4}, {}};
  const int64_t begin = s[0] % place.rectangle.numel();
  place.range = {begin, begin + 1 + s[1] % (place.rectangle.numel() - begin)};
  return place;
}

TEST(Layout, BoxesHoldTheElementsInOrder) {
  for (uint32_t trial = 0; trial < 2000; ++trial) {
    const PiecePlace place = random_place(trial, 0);
    std::vector<std::pair<int64_t, int64_t>> elements;
    for (const Box& box : boxes_of(place)) {
      for (int64_t row = box.rows.begin; row < box.rows.end; ++row) {
        for (int64_t column = box.columns.begin; column < box.columns.end; ++column) {
          EXPECT_EQ(index_in(place, row, column), static_cast<int64_t>(elements.size()));
          elements.emplace_back(row, column);
        }
      }
    }
    EXPECT_EQ(elements, elements_of(place)) << trial;
  }
}

TEST(Layout, SharedRunsAreWhatBothHold) {
  for (uint32_t trial = 0; trial < 5000; ++trial) {
    const PiecePlace from = random_place(trial, 1);
    const PiecePlace to = random_place(trial, 2);
    const auto from_elements = elements_of(from);
    const auto to_elements = elements_of(to);
    std::map<int64_t, int64_t> expected;
    for (size_t i = 0; i < from_elements.size(); ++i) {
      for (size_t j = 0; j < to_elements.size(); ++j) {
        if (from_elements[i] == to_elements[j]) expected[static_cast<int64_t>(i)] = static_cast<int64_t>(j);
      }
    }
    std::map<int64_t, int64_t> found;
    int64_t last = -1;
    for_each_shared_run(from, to, [&](int64_t a, int64_t b, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        EXPECT_GT(a + i, last);
        last = a + i;
        found[a + i] = b + i;
      }
    });
    EXPECT_EQ(found, expected) << trial;
  }
}

// Whether places cover a matrix exactly, held against counting its elements one by one.
TEST(Layout, CoverIsFoundAsCountingFindsIt) {
  int covered = 0;
  for (uint32_t trial = 0; trial < 3000; ++trial) {
    std::vector<PiecePlace> places;
    const uint32_t shape = philox4x32({trial, 9, 9, 0}, {1, 0})[0];
    if (shape % 2 == 0) {
      for (uint32_t i = 0; i < 2 + shape % 3; ++i) places.push_back(random_place(trial, 10 + i));
    } else {
      // Two columns of rectangles, each cut into runs; sometimes one is doubled or lost.
      const int64_t column = 1 + shape / 2 % 3;
      for (const Range columns : {Range{0, column}, Range{column, 4}}) {
        const Rectangle part{{0, 5}, columns, 5, 4};
        for (int64_t i = 0; i < 3; ++i) places.push_back({part, even_part(part.numel(), 3, i)});
      }
      if (shape / 8 % 3 == 0) places.push_back(random_place(trial, 20));
      if (shape / 8 % 3 == 1) places.erase(places.begin() + shape / 32 % 6);
    }
    std::map<std::pair<int64_t, int64_t>, int> count;
    bool twice = false;
    for (const PiecePlace& place : places) {
      for (const auto& element : elements_of(place)) twice |= ++count[element] > 1;
    }
    const std::string fault = find_cover_fault(5, 4, places);
    if (twice) {
      EXPECT_THAT(fault, HasSubstr("is held twice")) << trial;
    } else if (count.size() < 20) {
      EXPECT_EQ(fault, std::to_string(20 - count.size()) + " of its 20 elements are held by no piece")
          << trial;
    } else {
      EXPECT_EQ(fault, "") << trial;
      ++covered;
    }
  }
  EXPECT_GT(covered, 300);
}

TEST(Layout, HugePlacesDoNotOverflow) {
  const int64_t rows = int64_t{1} << 40;
  const Rectangle whole{{0, rows}, {0, 1 << 20}, rows, 1 << 20};
  const std::vector<PiecePlace> places{{whole, {0, 7}}, {whole, {7, whole.numel()}}};
  EXPECT_EQ(find_cover_fault(rows, 1 << 20, places), "");
}

}  // namespace
}  // namespace normformer
