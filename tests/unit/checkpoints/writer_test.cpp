// Saves beside what ranks do: the ring, the order of things, and what is kept.

#include <cstring>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/philox.h"

#include "faults/failing_files.h"
#include "faults/memory_files.h"
#include "faults/toy_checkpoint.h"
#include "staging.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::filesystem::path kFolder = "run/checkpoints";

TEST(StagingRing, HandsOverChunksOfAnySizeInTheirOrder) {
  for (const int64_t capacity : {16, 33, 100, 4096}) {
    StagingRing ring(capacity);
    constexpr uint32_t kChunks = 2000;
    const auto size_of_chunk = [&](uint32_t i) {
      return 1 + static_cast<int64_t>(philox4x32({i, 0, 0, 0}, {3, 4})[0]) % std::min<int64_t>(16, capacity);
    };
    std::thread filler([&] {
      for (uint32_t i = 0; i < kChunks; ++i) {
        const auto room = ring.reserve(size_of_chunk(i));
        std::fill(room.begin(), room.end(), static_cast<std::byte>(i));
        ring.commit();
      }
    });
    int64_t wrong = 0;
    for (uint32_t i = 0; i < kChunks; ++i) {
      const auto chunk = ring.oldest();
      wrong += static_cast<int64_t>(chunk.size()) != size_of_chunk(i);
      for (const std::byte b : chunk) wrong += b != static_cast<std::byte>(i);
      ring.release();
    }
    filler.join();
    EXPECT_EQ(wrong, 0) << "capacity " << capacity;
  }
}

TEST(StagingRing, StoppedLetsEverybodyGo) {
  StagingRing ring(8);
  EXPECT_EQ(ring.reserve(8).size(), 8u);
  ring.commit();
  std::thread filler([&] { EXPECT_TRUE(ring.reserve(1).empty()); });
  ring.stop();
  filler.join();
  EXPECT_TRUE(ring.oldest().empty());
  ring.restart();
  EXPECT_EQ(ring.reserve(3).size(), 3u);
}

/// A disk that waits before every append until it is let go.
class SlowFiles : public FailingFiles {
 public:
  explicit SlowFiles(FileSystem& files) : FailingFiles(files, Fault::none, 0) {}

  std::unique_ptr<WritableFile> create(const std::filesystem::path& path) override {
    open_.wait(false);
    return FailingFiles::create(path);
  }

  void let_go() {
    open_ = true;
    open_.notify_all();
  }

 private:
  std::atomic<bool> open_ = false;
};

int64_t count_wrong_in(FileSystem& files, int version) {
  Context context(DeviceKind::cpu);
  const auto pieces = toy_pieces(context, {1, 1}, 0, 0, false);
  const auto reader = open_newest_checkpoint(make_self_world(), files, kFolder,
                                             [&](const CheckpointReader& r) { r.read(pieces); });
  if (!reader || reader->info().update_count != version) return -1;
  return count_wrong(pieces, version);
}

// What is computed while the disk is slow is not in the checkpoint.
TEST(CheckpointWriter, SavesWhatStoodThereWhenTheSaveBegan) {
  MemoryFiles disk;
  SlowFiles slow(disk);
  run_local_world(3, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    CheckpointWriter writer(world, slow, kFolder, {.block_bytes = 64});
    const auto pieces = toy_pieces(context, {3, 1}, world.rank(), 1, true);
    EXPECT_FALSE(writer.begin(toy_info(1), pieces));
    for (const TensorPiece& piece : pieces)
      std::memset(piece.data.raw(), 0x55, static_cast<size_t>(piece.data.nbytes()));
    EXPECT_TRUE(writer.in_flight());
    EXPECT_EQ(writer.progress(), 0);
    EXPECT_FALSE(writer.advance(0));
    EXPECT_THAT(disk.list(kFolder), ElementsAre(".tmp-step-0000000001"));
    world.barrier();
    slow.let_go();
    std::optional<SaveResult> result;
    int64_t before = 0;
    while (!result) {
      std::vector<double> all;
      const auto mine = static_cast<double>(writer.progress());
      world.start_gather(context, {&mine, 1}, all).wait();
      const auto least = static_cast<int64_t>(*std::min_element(all.begin(), all.end()));
      EXPECT_GE(least, before);
      before = least;
      result = writer.advance(least);
    }
    EXPECT_EQ(before, 2);
    EXPECT_TRUE(*result) << result->reason;
    EXPECT_EQ(result->update_count, 1);
    EXPECT_GT(result->bytes, 0);
    EXPECT_FALSE(writer.in_flight());
    EXPECT_FALSE(writer.advance(2)) << "what is over is told once";
  });
  EXPECT_EQ(count_wrong_in(disk, 1), 0);
}

// With a ring of two blocks the copy waits for the disk; nothing else changes.
TEST(CheckpointWriter, GoesThroughASmallRing) {
  MemoryFiles disk;
  run_local_world(2, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    CheckpointWriter writer(world, disk, kFolder, {.keep = 1, .block_bytes = 16, .staging_bytes = 1});
    for (const int version : {1, 2, 3}) {
      const auto pieces = toy_pieces(context, {1, 2}, world.rank(), version, true);
      EXPECT_FALSE(writer.begin(toy_info(version), pieces));
      EXPECT_TRUE(writer.finish());
      EXPECT_EQ(writer.progress(), 2 * version);
    }
  });
  EXPECT_EQ(count_wrong_in(disk, 3), 0);
  EXPECT_THAT(disk.list(kFolder), ElementsAre("step-0000000003"));
}

TEST(CheckpointWriter, GivenUpOnItsWayLeavesTheOlderOnes) {
  MemoryFiles disk;
  SlowFiles slow(disk);
  run_local_world(2, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, {2, 1}, world.rank(), 1, true);
    EXPECT_TRUE(save_checkpoint(world, disk, kFolder, toy_info(1), pieces, {}));
    {
      CheckpointWriter writer(world, slow, kFolder, {.block_bytes = 16, .staging_bytes = 1 << 20});
      EXPECT_FALSE(writer.begin(toy_info(2), pieces));
      slow.let_go();
    }
    world.barrier();
  });
  EXPECT_EQ(count_wrong_in(disk, 1), 0);
}

TEST(CheckpointWriter, AFullDiskIsToldAndTheNextSaveWorks) {
  MemoryFiles disk;
  run_local_world(2, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, {2, 1}, world.rank(), 2, true);
    {
      FailingFiles full(disk, FailingFiles::Fault::disk_full, 0);
      FileSystem& mine = world.rank() == 1 ? static_cast<FileSystem&>(full) : disk;
      CheckpointWriter writer(world, mine, kFolder, {.block_bytes = 16, .staging_bytes = 1});
      EXPECT_FALSE(writer.begin(toy_info(1), pieces));
      const SaveResult failed = writer.finish();
      EXPECT_FALSE(failed);
      EXPECT_THAT(failed.reason, HasSubstr("rank 1: cannot write"));
      EXPECT_EQ(writer.progress(), 2);
    }
    EXPECT_TRUE(save_checkpoint(world, disk, kFolder, toy_info(2), pieces, {}));
  });
  EXPECT_EQ(count_wrong_in(disk, 2), 0);
  EXPECT_THAT(disk.list(kFolder), ElementsAre("step-0000000002"));
}

void save_versions(FileSystem& disk, std::initializer_list<int> versions, const SaveOptions& options) {
  Context context(DeviceKind::cpu);
  for (const int version : versions) {
    const auto pieces = toy_pieces(context, {1, 1}, 0, version, true);
    EXPECT_TRUE(save_checkpoint(make_self_world(), disk, kFolder, toy_info(version), pieces, options));
  }
}

TEST(CheckpointWriter, KeepsTheNewestAndEveryNth) {
  MemoryFiles disk;
  save_versions(disk, {10, 20, 25, 30, 40, 50, 60, 70}, {.keep = 2, .keep_every = 20});
  EXPECT_THAT(disk.list(kFolder),
              ElementsAre("step-0000000020", "step-0000000040", "step-0000000060", "step-0000000070"));
}

// A process of an earlier start that is not quite dead must not touch what the next one writes.
TEST(CheckpointWriter, OfAnEarlierAttemptWritesNothing) {
  MemoryFiles disk;
  save_versions(disk, {1}, {});
  disk.create(kFolder / "ATTEMPT")->append(as_bytes("12\n"));
  disk.make_folder(kFolder / ".tmp-step-0000000002");
  Context context(DeviceKind::cpu);
  const auto pieces = toy_pieces(context, {1, 1}, 0, 2, true);
  const SaveResult result =
      save_checkpoint(make_self_world(), disk, kFolder, toy_info(2), pieces, {.attempt = 11});
  EXPECT_FALSE(result);
  EXPECT_THAT(result.reason, HasSubstr("attempt 12 of this run has begun; this is attempt 11"));
  EXPECT_THAT(disk.list(kFolder), ElementsAre(".tmp-step-0000000002", "ATTEMPT", "step-0000000001"));
  save_versions(disk, {2}, {.attempt = 12});
  EXPECT_THAT(disk.list(kFolder), ElementsAre("ATTEMPT", "step-0000000001", "step-0000000002"));
}

TEST(CheckpointWriter, OvertakenBeforeItPublishesDoesNotPublish) {
  MemoryFiles disk;
  Context context(DeviceKind::cpu);
  const auto pieces = toy_pieces(context, {1, 1}, 0, 2, true);
  CheckpointWriter writer(make_self_world(), disk, kFolder, {.attempt = 1});
  EXPECT_FALSE(writer.begin(toy_info(2), pieces));
  disk.create(kFolder / "ATTEMPT")->append(as_bytes("2"));
  EXPECT_FALSE(writer.finish());
  EXPECT_THAT(disk.list(kFolder), ElementsAre("ATTEMPT"));
}

TEST(OpenNewest, EndsAtADamagedOneWhereTold) {
  MemoryFiles disk;
  save_versions(disk, {1, 2}, {});
  disk.content(kFolder / "step-0000000002" / "rank-00000-of-00001.bin")[9] ^= 1;
  const auto read_all = [](const CheckpointReader& r) {
    Context context(DeviceKind::cpu);
    r.read(toy_pieces(context, {1, 1}, 0, 0, false));
  };
  const auto open = [&](bool older_too) {
    return open_newest_checkpoint(make_self_world(), disk, kFolder, read_all, older_too);
  };
  EXPECT_EQ(open(true)->info().update_count, 1);
  try {
    open(false);
    FAIL();
  } catch (const DataError& e) {
    EXPECT_THAT(e.what(),
                HasSubstr("step-0000000002, cannot be used: checkpoint run/checkpoints/step-0000000002 "
                          "is damaged: bytes "));
    EXPECT_THAT(e.what(), HasSubstr("checkpoint.on_damage = \"older\""));
  }
}

}  // namespace
}  // namespace normformer
