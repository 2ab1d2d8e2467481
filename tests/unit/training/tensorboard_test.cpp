#include "normformer/training/tensorboard.h"

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <vector>

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

namespace normformer {
namespace {

std::string bytes_of(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes.push_back(static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
  return bytes;
}

class TensorBoard : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / fmt::format("normformer_tensorboard_{}", getpid());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::set<std::string> names() const {
    std::set<std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(folder_))
      all.insert(entry.path().filename().string());
    return all;
  }

  std::string content() const {
    std::ifstream file(folder_ / *names().begin(), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  std::filesystem::path folder_;
};

// The data of whole records; fails where bytes are left.
std::vector<std::string> records_of(const std::string& bytes) {
  std::vector<std::string> records;
  size_t at = 0;
  while (at + 12 <= bytes.size()) {
    uint64_t length = 0;
    std::memcpy(&length, bytes.data() + at, sizeof length);
    if (length > bytes.size() - at - 12) break;
    records.push_back(bytes.substr(at + 12, length));
    EXPECT_EQ(tfrecord(records.back()), bytes.substr(at, length + 16));
    at += length + 16;
  }
  EXPECT_EQ(at, bytes.size());
  return records;
}

// An event begins with its wall time, a double.
std::string without_time(const std::string& event) { return event.substr(9); }

// Both as TensorBoard's own writer has written them.
TEST(TfRecord, HasTheBytesOfTensorBoardsWriter) {
  for (const char* hex :
       {"1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
        "1a00000000000000129bd82d09000000000000004010072a0d0a0b0a046c6f73731500002040c2dfec60"}) {
    const std::string expected = bytes_of(hex);
    EXPECT_EQ(tfrecord(expected.substr(12, expected.size() - 16)), expected);
  }
}

// RFC 3720, B.4: the CRC-32C of 32 bytes of zeros is 8a9136aa; of 32 bytes of ones, 62a8ab43.
TEST(TfRecord, ChecksumsAreMaskedCrc32c) {
  const auto crc = [](const std::string& data) {
    const std::string record = tfrecord(data);
    uint32_t masked = 0;
    for (size_t i = 0; i < 4; ++i)
      masked |= static_cast<uint32_t>(static_cast<uint8_t>(record[record.size() - 4 + i])) << (8 * i);
    const uint32_t rotated = masked - 0xA282EAD8u;
    return (rotated >> 17) | (rotated << 15);
  };
  EXPECT_EQ(crc(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(crc(std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(crc("123456789"), 0xe3069283u);
}

TEST_F(TensorBoard, EachStartHasAFileThatSortsBehindTheOthers) {
  std::set<std::string> before;
  for (int start = 0; start < 3; ++start) {
    TensorBoardFile file(folder_, {});
    const std::set<std::string> now = names();
    ASSERT_EQ(now.size(), before.size() + 1);
    if (!before.empty()) {
      EXPECT_GT(*now.rbegin(), *before.rbegin());
    }
    before = now;
  }
}

TEST_F(TensorBoard, HistogramsAndTextHaveTheBytesOfTensorBoardsMessages) {
  TensorBoardFile file(folder_, {});
  file.write_distribution({.updates = 5}, {.name = "x.c_attn",
                                           .count = 4,
                                           .min = 0.5,
                                           .max = 2.0,
                                           .mean = 1.25,
                                           .std = 0.5,
                                           .edges = {0.5, 1.0, 1.5, 2.0},
                                           .counts = {1, 1, 2}});
  file.write_config({.updates = 3}, "a = 1\n");
  const std::vector<std::string> records = records_of(content());
  ASSERT_EQ(records.size(), 4u);  // behind the version and the start
  EXPECT_EQ(
      without_time(records[2]),
      bytes_of("10052a7d0a7b0a16646973747269627574696f6e732f782e635f6174746e2a6109000000000000e03f110000"
               "000000000040190000000000001040210000000000001440290000000000001d403218000000000000f03f00"
               "0000000000f83f00000000000000403a18000000000000f03f000000000000f03f0000000000000040"));
  EXPECT_EQ(
      without_time(records[3]),
      bytes_of("10032a2e0a2c0a06636f6e6669674218080712004212606060746f6d6c0a61203d20310a0a6060604a080a06"
               "0a0474657874"));
}

TEST_F(TensorBoard, WhatAFullDiskRefusesIsNotInTheFile) {
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  TensorBoardFile file(folder_, {});
  rlimit full = before;
  full.rlim_cur = content().size() + 20;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  file.write_validation({.updates = 1}, {.nll_sum = 6.0, .tokens = 3});
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  file.write_validation({.updates = 2}, {.nll_sum = 6.0, .tokens = 3});
  const std::vector<std::string> records = records_of(content());
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(without_time(records[2])[1], 2);  // its step, behind the field's key
}

TEST_F(TensorBoard, AStepThatWasSkippedLeavesNothing) {
  TensorBoardFile file(folder_, {});
  const auto bytes = [&] { return std::filesystem::file_size(folder_ / *names().begin()); };
  const auto empty = bytes();
  file.write_step(
      {.report = {.skipped = true, .reason = SkipReason::overflow}, .counters = {.batch_index = 1}}, {});
  EXPECT_EQ(bytes(), empty);
  file.write_step({.report = {.loss = 1.0}, .counters = {.batch_index = 2, .updates = 1}}, {});
  EXPECT_GT(bytes(), empty);
}

TEST_F(TensorBoard, AFolderThatCannotBeMadeIsNamed) {
  std::ofstream(folder_) << "a file";
  try {
    TensorBoardFile file(folder_ / "tensorboard", {});
    FAIL() << "did not throw";
  } catch (const IoError& e) {
    EXPECT_NE(std::string(e.what()).find(folder_.string()), std::string::npos);
  }
}

}  // namespace
}  // namespace normformer
