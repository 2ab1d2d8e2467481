// What is left of checkpoints when a save fails, when a rank dies in it, and when the power goes.

#include <atomic>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "faults/failing_files.h"
#include "faults/memory_files.h"
#include "faults/toy_checkpoint.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Fault = FailingFiles::Fault;

const std::filesystem::path kFolder = "run/checkpoints";
constexpr int kRanks = 2;
constexpr int64_t kBlockBytes = 64;

/// Saves `version` from two ranks; rank r through disk_of(r). What every rank got, or nullopt where a rank
/// was killed.
std::optional<SaveResult> save(const std::function<FileSystem&(int)>& disk_of, int version,
                               int64_t keep = 1) {
  SaveResult results[kRanks];
  try {
    run_local_world(kRanks, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const auto pieces = toy_pieces(context, {2, 1}, world.rank(), version, true);
      results[world.rank()] = save_checkpoint(world, disk_of(world.rank()), kFolder, toy_info(version),
                                              pieces, {.keep = keep, .block_bytes = kBlockBytes});
    });
  } catch (const Killed&) {
    return std::nullopt;
  }
  EXPECT_EQ(results[0].saved, results[1].saved);
  EXPECT_EQ(results[0].reason, results[1].reason);
  EXPECT_EQ(results[0].saved, results[0].reason.empty());
  return results[0];
}

std::optional<SaveResult> save(FileSystem& files, int version, int64_t keep = 1) {
  return save([&](int) -> FileSystem& { return files; }, version, keep);
}

/// The version of the newest good checkpoint, read completely by one rank; 0 where there is none.
int newest(FileSystem& files) {
  Context context(DeviceKind::cpu);
  const auto pieces = toy_pieces(context, {1, 1}, 0, 0, false);
  const auto reader = open_newest_checkpoint(make_self_world(), files, kFolder,
                                             [&](const CheckpointReader& r) { r.read(pieces); });
  if (!reader) return 0;
  const int version = static_cast<int>(reader->info().update_count);
  EXPECT_EQ(reader->info(), toy_info(version));
  EXPECT_EQ(count_wrong(pieces, version), 0);
  return version;
}

std::unique_ptr<MemoryFiles> disk_with_version_1() {
  auto files = std::make_unique<MemoryFiles>();
  EXPECT_TRUE(save(*files, 1)->saved);
  EXPECT_EQ(newest(*files), 1);
  files->settle();
  return files;
}

/// Whether a run can go on with what is there: the next save works and leaves nothing else.
void expect_recovery(MemoryFiles& files) {
  EXPECT_TRUE(save(files, 3)->saved);
  EXPECT_EQ(newest(files), 3);
  EXPECT_THAT(files.list(kFolder), ElementsAre("step-0000000003"));
}

// Every operation of a save, on each of two ranks, fails or is the last thing that rank does.
class OperationFault : public ::testing::TestWithParam<std::tuple<int, Fault>> {};

TEST_P(OperationFault, LeavesTheOldCheckpointOrTheNewOneComplete) {
  const auto [faulty_rank, fault] = GetParam();
  const auto start = disk_with_version_1();
  int64_t tried = 0;
  bool reached = true;
  for (int64_t at = 0; reached; ++at) {
    const auto disk = start->copy();
    FailingFiles failing(*disk, fault, at);
    const auto result = save(
        [&](int rank) -> FileSystem& {
          return rank == faulty_rank ? static_cast<FileSystem&>(failing) : *disk;
        },
        2);
    reached = failing.operations() > at;
    const bool killed = !result.has_value();
    const int version = newest(*disk);
    if (killed) {
      EXPECT_TRUE(version == 1 || version == 2) << "operation " << at;
    } else {
      EXPECT_EQ(version, result->saved ? 2 : 1) << "operation " << at << ": " << result->reason;
      if (!result->saved) {
        EXPECT_THAT(result->reason, StartsWith("rank " + std::to_string(faulty_rank) + ": cannot "));
        EXPECT_THAT(disk->list(kFolder), ElementsAre("step-0000000001")) << "operation " << at;
      }
    }
    if (reached) {
      ++tried;
    } else {
      EXPECT_TRUE(result && result->saved);
    }
    expect_recovery(*disk);
  }
  EXPECT_GT(tried, faulty_rank == 0 ? 30 : 20);
}

INSTANTIATE_TEST_SUITE_P(Faults, OperationFault,
                         ::testing::Combine(::testing::Values(0, 1),
                                            ::testing::Values(Fault::error, Fault::disk_full,
                                                              Fault::torn_error, Fault::kill,
                                                              Fault::torn_kill, Fault::kill_behind)));

// After every operation the power goes, and of what was not synced anything may be lost.
TEST(PowerCut, LeavesTheOldCheckpointOrTheNewOneComplete) {
  const auto disk = disk_with_version_1();
  ASSERT_TRUE(save(*disk, 2)->saved);
  int64_t images = 0;
  std::set<int> seen;
  for (int64_t cut = 0; cut <= disk->operations(); ++cut) {
    disk->for_each_crash(cut, [&](MemoryFiles& image) {
      ++images;
      const int version = newest(image);
      EXPECT_TRUE(version == 1 || version == 2) << "after operation " << cut;
      seen.insert(version);
      expect_recovery(image);
    });
  }
  disk->for_each_crash(disk->operations(),
                       [&](MemoryFiles& image) { EXPECT_EQ(newest(image), 2) << "the save was reported"; });
  EXPECT_GT(images, 200);
  EXPECT_EQ(seen.size(), 2u);
}

// The very first save makes its folders, too: once reported, it is there.
TEST(PowerCut, TheFirstCheckpointIsThereOrThereIsNone) {
  MemoryFiles disk;
  ASSERT_TRUE(save(disk, 1)->saved);
  for (int64_t cut = 0; cut <= disk.operations(); ++cut) {
    disk.for_each_crash(cut, [&](MemoryFiles& image) {
      const int version = newest(image);
      EXPECT_TRUE(version == 1 || (version == 0 && cut < disk.operations())) << "after operation " << cut;
    });
  }
}

// The model of the disk must be able to tell: each sync that is left out must show.
TEST(PowerCut, EverySyncIsNeeded) {
  const auto is = [](const std::string& end) {
    return [end](const std::filesystem::path& path) { return path.string().ends_with(end); };
  };
  const std::function<bool(const std::filesystem::path&)> left_out[] = {
      is("rank-00000-of-00002.bin"), is("rank-00001-of-00002.bin"), is("MANIFEST"),
      is(".tmp-step-0000000002"), is("run/checkpoints")};
  for (const auto& which : left_out) {
    const auto disk = disk_with_version_1();
    disk->ignore_syncs(which);
    ASSERT_TRUE(save(*disk, 2, 2)->saved);
    int64_t lost = 0;
    disk->for_each_crash(disk->operations(), [&](MemoryFiles& image) { lost += newest(image) != 2; });
    EXPECT_GT(lost, 0) << "sync " << &which - left_out;
  }
}

TEST(DiskFull, OnOneRankOfThreeIsToldToAll) {
  MemoryFiles disk;
  std::string reasons[3];
  run_local_world(3, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    FailingFiles full(disk, Fault::disk_full, 0);
    FileSystem& mine = world.rank() == 2 ? static_cast<FileSystem&>(full) : disk;
    const auto pieces = toy_pieces(context, {1, 3}, world.rank(), 1, true);
    const SaveResult result = save_checkpoint(world, mine, kFolder, toy_info(1), pieces, {.keep = 1});
    EXPECT_FALSE(result);
    reasons[world.rank()] = result.reason;
  });
  EXPECT_EQ(reasons[0],
            "rank 2: cannot write run/checkpoints/.tmp-step-0000000001/rank-00002-of-00003.bin: "
            "No space left on device");
  EXPECT_EQ(reasons[1], reasons[0]);
  EXPECT_EQ(reasons[2], reasons[0]);
  EXPECT_THAT(disk.list(kFolder), ElementsAre());
}

}  // namespace
}  // namespace normformer
