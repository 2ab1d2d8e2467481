#include "normformer/core/activity.h"

#include <thread>

#include <gtest/gtest.h>

namespace normformer {
namespace {

TEST(Activity, CountsWhereTheThreadSays) {
  ActivityCounter counter{0};
  note_activity();
  count_activity_in(&counter);
  EXPECT_EQ(activity_counter(), &counter);
  note_activity();
  std::thread([shared = activity_counter()] {
    EXPECT_EQ(activity_counter(), nullptr);
    note_activity();
    count_activity_in(shared);
    note_activity();
  }).join();
  EXPECT_EQ(counter, 2u);
  count_activity_in(nullptr);
  note_activity();
  EXPECT_EQ(counter, 2u);
}

}  // namespace
}  // namespace normformer
