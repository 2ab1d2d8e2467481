// Checkpoints whose bytes change after they were written: every change is found and named, and the older
// checkpoint is taken.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"
#include "normformer/core/philox.h"

#include "faults/memory_files.h"
#include "faults/toy_checkpoint.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

const std::filesystem::path kFolder = "checkpoints";
const std::filesystem::path kOld = kFolder / "step-0000000001";
const std::filesystem::path kNew = kFolder / "step-0000000002";
const std::string kFiles[] = {"rank-00000-of-00002.bin", "rank-00001-of-00002.bin"};

class Damage : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const int version : {1, 2}) {
      run_local_world(2, [&](const Group& world) {
        Context context(DeviceKind::cpu);
        const auto pieces = toy_pieces(context, {2, 1}, world.rank(), version, true);
        ASSERT_TRUE(save_checkpoint(world, disk_, kFolder, toy_info(version), pieces,
                                    {.keep = 2, .block_bytes = 64}));
      });
    }
    ASSERT_EQ(newest(), 2);
  }

  /// As a run of two other ranks finds it.
  int newest() {
    int versions[2];
    run_local_world(2, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const auto pieces = toy_pieces(context, {1, 2}, world.rank(), 0, false);
      const auto reader =
          open_newest_checkpoint(world, disk_, kFolder, [&](const CheckpointReader& r) { r.read(pieces); });
      const int version = reader ? static_cast<int>(reader->info().update_count) : 0;
      versions[world.rank()] = version;
      EXPECT_EQ(count_wrong(pieces, version), 0);
    });
    EXPECT_EQ(versions[0], versions[1]);
    return versions[0];
  }

  /// What opening the newer checkpoint and reading all of it says; "" where nothing.
  std::string complaint() {
    Context context(DeviceKind::cpu);
    try {
      CheckpointReader(disk_, kNew).read(toy_pieces(context, {1, 1}, 0, 0, false));
      return "";
    } catch (const DamagedCheckpoint& e) {
      return e.what();
    }
  }

  MemoryFiles disk_;
};

TEST_F(Damage, EveryFlippedBitOfTheManifestIsFound) {
  std::string& manifest = disk_.content(kNew / "MANIFEST");
  ASSERT_GT(manifest.size(), 1000u);
  for (size_t bit = 0; bit < manifest.size() * 8; ++bit) {
    const auto flip = [&] { manifest[bit / 8] = static_cast<char>(manifest[bit / 8] ^ (1 << (bit % 8))); };
    flip();
    ASSERT_THAT(complaint(), HasSubstr((kNew / "MANIFEST").string() + " is damaged: ")) << "bit " << bit;
    flip();
  }
  manifest[manifest.size() / 2] ^= 1;
  EXPECT_EQ(newest(), 1);
}

// Ten thousand changes in the files of data: one bit flipped, or the file cut anywhere.
TEST_F(Damage, FlippedBitsAndCutsOfDataAreFoundAndNamed) {
  const CheckpointReader reader(disk_, kNew);
  EXPECT_THAT(reader.find_damage(), IsEmpty());
  for (uint64_t trial = 0; trial < 10000; ++trial) {
    const auto random = philox4x32({static_cast<uint32_t>(trial), 0, 0, 0}, {1, 2});
    const std::string& name = kFiles[random[0] % 2];
    std::string& bytes = disk_.content(kNew / name);
    const std::string whole = bytes;
    const bool cuts = random[2] % 4 == 0;
    const size_t bit = random[1] % (bytes.size() * 8);
    if (cuts)
      bytes.resize(bit / 8);
    else
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
    const std::string said = complaint();
    ASSERT_THAT(said, HasSubstr("checkpoint checkpoints/step-0000000002 is damaged: ")) << trial;
    ASSERT_THAT(said, cuts ? HasSubstr("its file " + name + " has ")
                           : HasSubstr(" of " + name + ", in tensor 'decoder."))
        << trial;
    if (trial % 100 == 0) {
      EXPECT_THAT(reader.find_damage(), ::testing::Not(IsEmpty()));
      EXPECT_EQ(newest(), 1);
    }
    bytes = whole;
  }
  EXPECT_EQ(newest(), 2);
}

TEST_F(Damage, CutAndExtendedFilesAreFoundAndNamed) {
  for (const std::string name : {"MANIFEST", "rank-00000-of-00002.bin", "rank-00001-of-00002.bin"}) {
    std::string& bytes = disk_.content(kNew / name);
    const std::string whole = bytes;
    for (const size_t size : {size_t{0}, size_t{1}, whole.size() / 2, whole.size() - 1}) {
      bytes = whole.substr(0, size);
      EXPECT_THAT(complaint(), HasSubstr(name)) << size;
      EXPECT_EQ(newest(), 1) << name << " " << size;
    }
    bytes = whole + '\0';
    EXPECT_THAT(complaint(), HasSubstr(name));
    EXPECT_EQ(newest(), 1) << name;
    bytes = whole;
  }
  EXPECT_EQ(newest(), 2);
}

TEST_F(Damage, EveryCutOfTheManifestIsFound) {
  std::string& manifest = disk_.content(kNew / "MANIFEST");
  const std::string whole = manifest;
  for (size_t size = 0; size < whole.size(); ++size) {
    manifest = whole.substr(0, size);
    ASSERT_THAT(complaint(), HasSubstr("MANIFEST is damaged: ")) << size;
  }
}

TEST_F(Damage, MissingFilesAreNamed) {
  disk_.remove_file(kNew / kFiles[1]);
  EXPECT_THAT(complaint(),
              HasSubstr("step-0000000002 is damaged: its file rank-00001-of-00002.bin is missing"));
  EXPECT_EQ(newest(), 1);
  disk_.remove_file(kNew / "MANIFEST");
  EXPECT_THAT(complaint(), HasSubstr("step-0000000002 is not a checkpoint: it has no file MANIFEST"));
  EXPECT_EQ(newest(), 1);
}

TEST_F(Damage, SwappedFilesAreFound) {
  std::swap(disk_.content(kNew / kFiles[0]), disk_.content(kNew / kFiles[1]));
  EXPECT_THAT(complaint(), HasSubstr("is damaged"));
  EXPECT_EQ(newest(), 1);
}

TEST_F(Damage, AFileOfTheOlderCheckpointIsFound) {
  disk_.content(kNew / kFiles[0]) = disk_.content(kOld / kFiles[0]);
  EXPECT_THAT(complaint(), HasSubstr("have checksum"));
  EXPECT_EQ(newest(), 1);
}

TEST_F(Damage, AManifestOfTheOlderCheckpointIsFound) {
  disk_.content(kNew / "MANIFEST") = disk_.content(kOld / "MANIFEST");
  EXPECT_THAT(complaint(), HasSubstr("have checksum"));
  EXPECT_EQ(newest(), 1);
}

TEST_F(Damage, NeverEndsInAFreshStart) {
  disk_.content(kNew / kFiles[0])[5] ^= 4;
  disk_.content(kOld / "MANIFEST").clear();
  try {
    newest();
    FAIL();
  } catch (const DataError& e) {
    EXPECT_THAT(e.what(), HasSubstr("none of the 2 checkpoints in checkpoints can be read; the newest: "));
    EXPECT_THAT(e.what(), HasSubstr("rank-00000-of-00002.bin"));
  }
}

// A run that fell back and comes to the same number of updates again writes beside the damaged checkpoint,
// and readers prefer what it wrote.
TEST_F(Damage, IsReplacedWhenTheRunComesThereAgain) {
  disk_.content(kNew / kFiles[0])[5] ^= 4;
  run_local_world(2, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, {2, 1}, world.rank(), 2, true);
    const SaveResult result =
        save_checkpoint(world, disk_, kFolder, toy_info(2), pieces, {.keep = 2, .block_bytes = 64});
    EXPECT_EQ(result.folder, kFolder / "step-0000000002-2");
  });
  EXPECT_EQ(newest(), 2);
  EXPECT_THAT(disk_.list(kFolder), ::testing::ElementsAre("step-0000000001", "step-0000000002-2"));
}

}  // namespace
}  // namespace normformer
