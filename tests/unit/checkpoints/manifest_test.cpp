#include "manifest.h"

#include <cstring>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/manifest_frame.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;

/// Two files; a matrix [4, 3] in both, by columns, and a vector of 5 in the second.
Manifest small_manifest() {
  Manifest m;
  m.block_bytes = 16;
  m.info.run_id = "r";
  m.files = {{"a.bin", 16}, {"b.bin", 32 + 40}};
  StoredTensor matrix{{"m", Role::parameter, DType::f32, 4, 3}, {}};
  matrix.pieces.push_back({0, 0, {{{0, 4}, {0, 1}, 4, 3}, {0, 4}}, {1}});
  matrix.pieces.push_back({1, 0, {{{0, 4}, {1, 3}, 4, 3}, {0, 8}}, {2, 3}});
  StoredTensor vector{{"v", Role::moment1, DType::f64, 5, 1}, {}};
  vector.pieces.push_back({1, 32, {{{0, 5}, {0, 1}, 5, 1}, {0, 5}}, {4, 5, 6}});
  m.tensors.push_back(std::move(matrix));
  m.tensors.push_back(std::move(vector));
  return m;
}

std::string complaint(const std::string& bytes) {
  try {
    read_manifest(bytes, "run/MANIFEST");
    return "accepted";
  } catch (const DataError& e) {
    return e.what();
  }
}

template <class Change>
std::string complaint_after(Change&& change) {
  Manifest m = small_manifest();
  change(m);
  return complaint(write_manifest(m));
}

TEST(Manifest, ComesBackAsItWas) {
  Manifest written = small_manifest();
  written.info.loss_scale = 0x1p-9;
  written.info.clean_updates = 77;
  written.info.overflows = 5;
  written.info.recent_losses = {2.5, 1.0 / 3.0};
  written.info.recent_gradient_norms = {0.5, 1e-300};
  written.info.trend_losses = {7.5, 7.25};
  written.info.lowest_loss = 0.0;
  const Manifest read = read_manifest(write_manifest(written), "x");
  EXPECT_EQ(read.info, written.info);
  EXPECT_EQ(read.block_bytes, 16);
  ASSERT_EQ(read.files.size(), 2u);
  EXPECT_EQ(read.files[1].name, "b.bin");
  EXPECT_EQ(read.files[1].bytes, 72);
  ASSERT_EQ(read.tensors.size(), 2u);
  EXPECT_EQ(read.tensors[1].info.role, Role::moment1);
  EXPECT_EQ(read.tensors[1].info.dtype, DType::f64);
  EXPECT_EQ(read.tensors[0].pieces[1].place, written.tensors[0].pieces[1].place);
  EXPECT_EQ(read.tensors[0].pieces[1].block_checksums, (std::vector<uint64_t>{2, 3}));
}

// A checksum does not protect from someone who can compute it: every number is checked against the others.
TEST(Manifest, HostileContentsAreRefusedWithTheirFault) {
  const int64_t huge = INT64_MAX;
  using Change = std::function<void(Manifest&)>;
  const std::pair<const char*, Change> cases[] = {
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = "../a"; }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = ".."; }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = ""; }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = "a/b"; }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = "MANIFEST"; }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = std::string(256, 'a'); }},
      {"its data file 0 has a forbidden name", [](Manifest& m) { m.files[0].name = std::string("a\0b", 3); }},
      {"the data file 'b.bin' is listed twice", [](Manifest& m) { m.files[0].name = "b.bin"; }},
      {"lies outside the file 'a.bin'", [](Manifest& m) { m.files[0].bytes = 15; }},
      {"the pieces in file 'a.bin' end at byte 16 of 17", [](Manifest& m) { m.files[0].bytes = 17; }},
      {"the pieces in file 'c' end at byte 0 of 1",
       [](Manifest& m) {
         m.files.push_back({"c", 1});
       }},
      {"a file's length is 18446744073709551615", [](Manifest& m) { m.files[0].bytes = -1; }},
      {"a block has 0 bytes", [](Manifest& m) { m.block_bytes = 0; }},
      {"a block has 12 bytes", [](Manifest& m) { m.block_bytes = 12; }},
      {"a block has 134217728 bytes", [](Manifest& m) { m.block_bytes = 128 << 20; }},
      {"a tensor's name is empty", [](Manifest& m) { m.tensors[0].info.name = ""; }},
      {"too long", [](Manifest& m) { m.tensors[0].info.name = std::string(513, 'n'); }},
      {"has control characters", [](Manifest& m) { m.tensors[0].info.name = std::string("n\0m", 3); }},
      {"tensor 'a' is listed twice or out of order", [](Manifest& m) { m.tensors[1].info.name = "a"; }},
      {"tensor 'v' has no elements", [](Manifest& m) { m.tensors[1].info.columns = 0; }},
      {"a tensor leaves 64 bits",
       [&](Manifest& m) { m.tensors[1].info.rows = m.tensors[1].info.columns = huge; }},
      {"a tensor leaves 64 bits", [&](Manifest& m) { m.tensors[1].info.rows = huge / 4; }},
      {"1 of its 6 elements are held by no piece", [](Manifest& m) { m.tensors[1].info.rows = 6; }},
      {"a piece of tensor 'v' lies outside of it", [](Manifest& m) { m.tensors[1].info.rows = 4; }},
      {"lies outside of it",
       [](Manifest& m) {
         m.tensors[0].pieces[0].place.rectangle.rows = {4, 4};
       }},
      {"lies outside of it",
       [&](Manifest& m) {
         m.tensors[0].pieces[0].place.rectangle.rows = {0, huge};
       }},
      {"a place in tensor 'm' is",
       [](Manifest& m) {
         m.tensors[0].pieces[0].place.rectangle.rows = {-1, 4};
       }},
      {"lies outside its rectangle",
       [](Manifest& m) {
         m.tensors[0].pieces[0].place.range = {0, 5};
       }},
      {"lies outside its rectangle",
       [](Manifest& m) {
         m.tensors[0].pieces[0].place.range = {2, 2};
       }},
      {"in a file that is not listed", [](Manifest& m) { m.tensors[0].pieces[0].file = 2; }},
      {"lies outside the file 'a.bin'", [](Manifest& m) { m.tensors[0].pieces[0].offset = 8; }},
      {"lies outside the file 'a.bin'", [&](Manifest& m) { m.tensors[0].pieces[0].offset = huge; }},
      {"leave a gap or overlap at byte 32", [](Manifest& m) { m.tensors[1].pieces[0].offset = 24; }},
      {"has 2 checksums",
       [](Manifest& m) {
         m.tensors[0].pieces[0].block_checksums = {1, 1};
       }},
      {"has 1 checksums",
       [&](Manifest& m) {
         m.files = {{"a.bin", huge}};
         m.tensors = {{{"t", Role::parameter, DType::u8, huge, 1}, {}}};
         m.tensors[0].pieces.push_back({0, 0, {{{0, huge}, {0, 1}, huge, 1}, {0, huge}}, {1}});
       }},
      {"tensor 'm' (parameter): the element at row 0, column 1 is held twice",
       [](Manifest& m) {
         m.tensors[0].pieces[0].place.rectangle.columns = {1, 2};
       }},
      {"the update count is 18446744073709551615", [](Manifest& m) { m.info.update_count = -1; }},
      {"the loss scale 3 is not a power of two", [](Manifest& m) { m.info.loss_scale = 3.0; }},
      {"the loss scale -2 is not a power of two", [](Manifest& m) { m.info.loss_scale = -2.0; }},
      {"the number of overflows is 18446744073709551615", [](Manifest& m) { m.info.overflows = -1; }},
      {"it has 1 recent losses for 0 gradient norms", [](Manifest& m) { m.info.recent_losses = {1.0}; }},
      {"a recent loss or norm is not finite",
       [](Manifest& m) { m.info.recent_gradient_norms = {std::numeric_limits<double>::infinity()}; }},
      {"the lowest loss is not finite",
       [](Manifest& m) { m.info.lowest_loss = std::numeric_limits<double>::quiet_NaN(); }},
  };
  for (const auto& [fault, change] : cases) {
    const std::string said = complaint_after(change);
    EXPECT_THAT(said, HasSubstr("run/MANIFEST is damaged: "));
    EXPECT_THAT(said, HasSubstr(fault));
  }
}

TEST(Manifest, HostilePayloadsAreRefused) {
  EXPECT_THAT(complaint(framed("")), HasSubstr("it states no format version"));
  EXPECT_THAT(complaint(framed("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")), HasSubstr("malformed"));
  EXPECT_THAT(complaint(framed("\x3a\x7f")), HasSubstr("malformed"));              // longer than what follows
  EXPECT_THAT(complaint(framed("\x3b\x3c")), HasSubstr("malformed"));              // a group
  EXPECT_THAT(complaint(framed("\x22\x03\x0a\x01\xff")), HasSubstr("malformed"));  // not UTF-8
  std::string empty_tensors;
  for (int i = 0; i < 4'000'001; ++i) empty_tensors += std::string("\x3a\x00", 2);
  EXPECT_THAT(complaint(framed(empty_tensors)), HasSubstr("it has more than 4000000 parts"));
  std::string empty_pieces;
  for (int i = 0; i < 4'000'001; ++i) empty_pieces += std::string("\x32\x00", 2);
  const std::string length = "\x82\xa4\xe8\x03";  // 8 000 002
  EXPECT_THAT(complaint(framed("\x3a" + length + empty_pieces)), HasSubstr("it has more than 4000000 parts"));
}

TEST(Manifest, NewerVersionsAreRefusedAsSuch) {
  const std::string newer = complaint(framed(std::string("\x08\x02\x10\x02", 4)));
  EXPECT_EQ(newer, "run/MANIFEST cannot be read: it needs a program that reads format 2; this one reads 1");
  EXPECT_THAT(complaint(framed(std::string("\x08\x01\x10\x01\x1a\x04warp", 10))),
              HasSubstr("cannot be read: it needs the feature 'warp', which this program lacks"));
  EXPECT_THAT(complaint(framed("", 2)),
              HasSubstr("cannot be read: it has frame version 2, this program reads 1"));
}

TEST(Manifest, ANewerWritersUnknownFieldsAreNoObstacle) {
  const std::string bytes = write_manifest(small_manifest());
  const std::string payload = payload_in(bytes) + std::string("\xfa\x06\x03new", 6);
  EXPECT_EQ(complaint(framed(payload)), "accepted");
}

}  // namespace
}  // namespace normformer
