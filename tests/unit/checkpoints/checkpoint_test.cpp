#include "normformer/checkpoints/checkpoint.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "faults/memory_files.h"
#include "faults/toy_checkpoint.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const std::filesystem::path kFolder = "run/checkpoints";

void save(FileSystem& files, const std::filesystem::path& folder, ToyLayout layout, int version,
          int64_t keep = 9, int64_t block_bytes = 64) {
  run_local_world(static_cast<int>(layout.ranks()), [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, layout, world.rank(), version, true);
    const SaveResult result = save_checkpoint(world, files, folder, toy_info(version), pieces,
                                              {.keep = keep, .block_bytes = block_bytes});
    EXPECT_TRUE(result) << result.reason;
  });
}

void load(FileSystem& files, const std::filesystem::path& folder, ToyLayout layout, int version) {
  run_local_world(static_cast<int>(layout.ranks()), [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, layout, world.rank(), version, false);
    const auto reader =
        open_newest_checkpoint(world, files, folder, [&](const CheckpointReader& r) { r.read(pieces); });
    ASSERT_TRUE(reader);
    EXPECT_EQ(reader->info(), toy_info(version));
    EXPECT_EQ(count_wrong(pieces, version), 0);
  });
}

template <class Body>
std::string message_of(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// What any layout wrote, any other reads: every element compared.
TEST(Checkpoint, ReadsUnderEveryOtherLayout) {
  const ToyLayout layouts[] = {{1, 1}, {2, 1}, {1, 2}, {3, 1}, {2, 2}, {1, 4}, {4, 1}, {3, 2}, {1, 5}};
  for (const ToyLayout written : layouts) {
    for (const int64_t block_bytes : {8, 64, 1 << 20}) {
      MemoryFiles files;
      save(files, kFolder, written, 5, 1, block_bytes);
      for (const ToyLayout read : layouts) {
        SCOPED_TRACE(testing::Message() << written.tensor << "x" << written.data << " -> " << read.tensor
                                        << "x" << read.data << ", blocks of " << block_bytes);
        load(files, kFolder, read, 5);
      }
    }
  }
}

TEST(Checkpoint, LivesOnARealDisk) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  const auto checkpoints = folder / "a" / "b";
  save(*files, checkpoints, {2, 2}, 1);
  save(*files, checkpoints, {2, 2}, 2, 1);
  load(*files, checkpoints, {3, 1}, 2);
  EXPECT_THAT(files->list(checkpoints), ElementsAre("step-0000000002"));
  EXPECT_THAT(files->list(checkpoints / "step-0000000002"),
              ElementsAre("MANIFEST", "rank-00000-of-00004.bin", "rank-00001-of-00004.bin",
                          "rank-00002-of-00004.bin", "rank-00003-of-00004.bin"));
  // A link in a data file's place is not followed.
  std::filesystem::rename(checkpoints / "step-0000000002" / "rank-00000-of-00004.bin", folder / "elsewhere");
  std::filesystem::create_symlink(folder / "elsewhere",
                                  checkpoints / "step-0000000002" / "rank-00000-of-00004.bin");
  EXPECT_THAT(message_of([&] { CheckpointReader(*files, checkpoints / "step-0000000002"); }),
              HasSubstr("rank-00000-of-00004.bin: Too many levels of symbolic links"));
}

TEST(Checkpoint, ListsItsTensors) {
  MemoryFiles files;
  save(files, kFolder, {2, 1}, 1);
  const CheckpointReader reader(files, kFolder / "step-0000000001");
  ASSERT_EQ(reader.tensors().size(), 20u);
  const StoredTensorInfo& first = reader.tensors()[0];
  EXPECT_EQ(first.name, "decoder.embed_tokens.weight");
  EXPECT_EQ(first.role, Role::parameter);
  EXPECT_EQ(first.dtype, DType::bf16);
  EXPECT_EQ(first.rows, 37);
  EXPECT_EQ(first.columns, 6);
  EXPECT_EQ(reader.tensors()[1].role, Role::master);
  EXPECT_THAT(reader.find_damage(), IsEmpty());
}

// A second run of the same training writes the same bytes.
TEST(Checkpoint, TheSameSaveGivesTheSameBytes) {
  MemoryFiles a;
  MemoryFiles b;
  save(a, kFolder, {2, 2}, 3);
  save(b, kFolder, {2, 2}, 3);
  for (const std::string& name : a.list(kFolder / "step-0000000003")) {
    EXPECT_EQ(a.content(kFolder / "step-0000000003" / name), b.content(kFolder / "step-0000000003" / name));
  }
}

TEST(Checkpoint, RanksWithoutPiecesWriteNoFile) {
  MemoryFiles files;
  run_local_world(2, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    std::vector<TensorPiece> pieces;
    if (world.rank() == 1) pieces = toy_pieces(context, {1, 1}, 0, 1, true);
    EXPECT_TRUE(save_checkpoint(world, files, kFolder, toy_info(1), pieces, {.keep = 1}));
  });
  EXPECT_THAT(files.list(kFolder / "step-0000000001"), ElementsAre("MANIFEST", "rank-00001-of-00002.bin"));
  load(files, kFolder, {2, 1}, 1);
}

TEST(Checkpoint, KeepsTheNewest) {
  MemoryFiles files;
  for (const int version : {2, 4, 6, 8}) save(files, kFolder, {1, 1}, version, 2);
  EXPECT_THAT(list_checkpoints(files, kFolder), ElementsAre("step-0000000008", "step-0000000006"));
  EXPECT_THAT(files.list(kFolder), ElementsAre("step-0000000006", "step-0000000008"));
}

// After going back, the run's own checkpoints count, and those of its abandoned future are not read again.
TEST(Checkpoint, SetsAsideWhatARunThatWentBackHasLeft) {
  MemoryFiles files;
  for (const int version : {2, 4, 6}) save(files, kFolder, {1, 1}, version, 3);
  save(files, kFolder, {1, 1}, 3, 2);
  EXPECT_THAT(list_checkpoints(files, kFolder), ElementsAre("step-0000000003", "step-0000000002"));
  EXPECT_THAT(files.list(kFolder), ElementsAre("set-aside-step-0000000004", "set-aside-step-0000000006",
                                               "step-0000000002", "step-0000000003"));
  load(files, kFolder, {1, 2}, 3);
  save(files, kFolder, {1, 1}, 6, 2);
  save(files, kFolder, {1, 1}, 5, 2);
  EXPECT_THAT(files.list(kFolder),
              ElementsAre("set-aside-step-0000000004", "set-aside-step-0000000006",
                          "set-aside-step-0000000006-again-2", "step-0000000003", "step-0000000005"));
}

TEST(Checkpoint, RemovesLeftovers) {
  MemoryFiles files;
  make_folders(files, kFolder / ".tmp-step-0000000007");
  files.create(kFolder / ".tmp-step-0000000007" / "rank-00000-of-00001.bin");
  make_folders(files, kFolder / ".del-step-0000000001");
  make_folders(files, kFolder / "step-of-the-user");
  save(files, kFolder, {1, 1}, 7);
  EXPECT_THAT(files.list(kFolder), ElementsAre("step-0000000007", "step-of-the-user"));
}

TEST(Checkpoint, NoneIsNotAnError) {
  MemoryFiles files;
  const auto open = [&] {
    return open_newest_checkpoint(make_self_world(), files, kFolder, [](const CheckpointReader&) { FAIL(); });
  };
  EXPECT_FALSE(open());
  make_folders(files, kFolder / ".tmp-step-0000000007");
  EXPECT_FALSE(open());
}

TEST(Checkpoint, AnotherModelIsToldFromDamage) {
  MemoryFiles files;
  save(files, kFolder, {1, 1}, 1);
  save(files, kFolder, {1, 1}, 2);
  Context context(DeviceKind::cpu);
  const auto read = [&](const std::function<void(TensorPiece&)>& change) {
    std::vector<TensorPiece> pieces = toy_pieces(context, {1, 1}, 0, 2, false);
    change(pieces[0]);
    return message_of([&] {
      open_newest_checkpoint(make_self_world(), files, kFolder,
                             [&](const CheckpointReader& r) { r.read(pieces); });
    });
  };
  EXPECT_EQ(read([](TensorPiece& p) { p.name = "decoder.other"; }),
            "checkpoint run/checkpoints/step-0000000002 has no tensor 'decoder.other' (parameter): it is of "
            "another "
            "model; resume it with its own configuration, or choose another folder");
  EXPECT_THAT(
      read([&](TensorPiece& p) {
        p.rectangle = {{0, 38}, {0, 6}, 38, 6};
        p.range = {0, 228};
        p.data = context.empty({228}, DType::bf16);
      }),
      HasSubstr(
          "has tensor 'decoder.embed_tokens.weight' (parameter) as 37 x 6 where this model has 38 x 6"));
  EXPECT_THAT(read([&](TensorPiece& p) { p.data = context.empty({222}, DType::f32); }),
              HasSubstr("in bf16 where this run computes in f32; set train.precision as it was, or convert "
                        "it with `normformer "
                        "checkpoint reshard`"));
}

// One rank's objection ends the loading on all, with its own words and exit code.
TEST(Checkpoint, AllRanksAgreeOnARefusal) {
  MemoryFiles files;
  save(files, kFolder, {1, 1}, 1);
  run_local_world(3, [&](const Group& world) {
    try {
      open_newest_checkpoint(world, files, kFolder, [&](const CheckpointReader&) {
        if (world.rank() == 1) throw ConfigError("the tokenizer differs");
      });
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "the tokenizer differs");
      EXPECT_EQ(e.exit_code(), ExitCode::bad_usage);
    }
  });
}

TEST(Checkpoint, ACheckpointDamagedForOneRankIsLeftByAll) {
  MemoryFiles files;
  save(files, kFolder, {1, 2}, 1);
  save(files, kFolder, {1, 2}, 2);
  files.content(kFolder / "step-0000000002" / "rank-00001-of-00002.bin").back() ^= 1;
  load(files, kFolder, {1, 2}, 1);
}

TEST(Checkpoint, PiecesThatDoNotFitAreABugOnAllRanks) {
  for (const bool twice : {false, true}) {
    MemoryFiles files;
    run_local_world(2, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      auto pieces = toy_pieces(context, {1, 2}, world.rank(), 1, true);
      if (world.rank() == 1 && twice) pieces.push_back(pieces[2]);
      if (world.rank() == 1 && !twice) pieces.erase(pieces.begin() + 2);
      try {
        save_checkpoint(world, files, kFolder, toy_info(1), pieces, {.keep = 1});
        ADD_FAILURE();
      } catch (const LogicError& e) {
        EXPECT_THAT(e.what(), HasSubstr("ranks save 'decoder.layers.0.fc1.weight' (parameter)"));
        EXPECT_THAT(e.what(),
                    HasSubstr(twice ? "is held twice" : "39 of its 78 elements are held by no piece"));
      }
    });
    EXPECT_THAT(files.list(kFolder), IsEmpty());
  }
}

// A checkpoint of format version 1, kept as it was written: today's program reads it, and writes it again.
TEST(Checkpoint, ReadsAndWritesTheGoldenVersion1) {
  const std::filesystem::path golden =
      std::filesystem::path(NORMFORMER_TEST_FIXTURES) / "checkpoints" / "version-1";
  const auto disk = make_system_files();
  load(*disk, golden, {2, 2}, 7);
  MemoryFiles files;
  save(files, kFolder, {2, 1}, 7, 1, 256);
  for (const std::string& name : disk->list(golden / "step-0000000007")) {
    std::ifstream file(golden / "step-0000000007" / name, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    EXPECT_TRUE(bytes == files.content(kFolder / "step-0000000007" / name)) << name;
  }
}

}  // namespace
}  // namespace normformer
