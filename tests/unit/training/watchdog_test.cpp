#include "normformer/training/watchdog.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"
#include "normformer/core/file_system.h"
#include "normformer/tensor/context.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ExitedWithCode;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

nlohmann::json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file, nullptr, false);
}

std::vector<std::filesystem::path> reports_in(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> found;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    if (file.path().filename().string().starts_with("hang-")) found.push_back(file.path());
  }
  return found;
}

// A rank of a run of one or more, whose folder is there.
struct Rank {
  explicit Rank(const std::filesystem::path& folder, int rank = 0, int size = 1)
      : ledgers(folder / "ledger"), world(make_meta_world(rank, size)) {
    std::filesystem::create_directories(ledgers);
    file = std::make_shared<LedgerFile>(ledgers / ledger_file_name(rank), rank, size);
    world.ledger().attach(file);
  }
  WatchdogOptions options(const std::filesystem::path& folder, double limit_seconds) const {
    return {.limit_seconds = limit_seconds,
            .run_folder = folder,
            .ledgers = ledgers,
            .rank = world.rank(),
            .updates = 9,
            .patience_seconds = 1.0};
  }

  std::filesystem::path ledgers;
  Group world;
  std::shared_ptr<LedgerFile> file;
};

// The process is started anew for what ends it, since threads do not survive a fork; it is told of the folder
// by its environment, and leaves there what a run would.
class WatchdogThatEndsTheJob : public ::testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    if (const char* told = std::getenv(kFolder)) {
      folder_ = told;
      return;
    }
    made_.emplace();
    folder_ = made_->path();
    setenv(kFolder, folder_.c_str(), 1);
  }
  void TearDown() override { unsetenv(kFolder); }

  [[noreturn]] void hang(WatchdogOptions options, std::shared_ptr<LedgerFile> ledger) {
    Watchdog watchdog(std::move(options));
    if (ledger) watchdog.open(std::move(ledger));
    watchdog.enter(RunPhase::saving);
    while (true) std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  [[noreturn]] void hang(int rank, int size) {
    Rank made(folder_, rank, size);
    hang(made.options(folder_, 0.3), made.file);
  }

  static constexpr const char* kFolder = "NORMFORMER_TEST_FOLDER";
  std::optional<TemporaryFolder> made_;
  std::filesystem::path folder_;
};

TEST(Watchdog, LeavesARankAloneThatMakesProgressOfAnyKind) {
  const TemporaryFolder folder;
  Rank rank(folder.path(), 0, 2);
  Context context(DeviceKind::meta);
  const auto files = make_system_files();
  const auto written = files->create(folder / "block");
  Watchdog watchdog(rank.options(folder.path(), 0.5));
  watchdog.open(rank.file);
  const std::function<void()> kinds[] = {
      [&] { watchdog.enter(RunPhase::training); },
      [&] { watchdog.finish_update(1, 2.0); },
      [&] { rank.world.barrier(); },
      [&] { const TraceScope scope(context, TraceKind::operation, "matmul"); },
      [&] { written->append(as_bytes("block")); },
  };
  // Each kind alone keeps the job alive for longer than the limit.
  for (const auto& progress : kinds) {
    for (int i = 0; i < 20; ++i) {
      progress();
      std::this_thread::sleep_for(std::chrono::milliseconds(40));
    }
  }
  watchdog.end(RunState::finished);
}

TEST(Watchdog, GivesSignsOfLifeAndHeartbeatsUntilTheRunEnds) {
  const TemporaryFolder folder;
  const auto path = folder / "heartbeat.json";
  setenv("NORMFORMER_ATTEMPT", "17", 1);
  for (const RunState state : {RunState::finished, RunState::stopped, RunState::failed}) {
    Rank rank(folder.path());
    {
      Watchdog watchdog(rank.options(folder.path(), 0.0));
      EXPECT_EQ(watchdog.enter(RunPhase::loading), RunPhase::starting);
      watchdog.open(rank.file);
      while (read_ledger(rank.ledgers / ledger_file_name(0)).alive_ns == 0) std::this_thread::yield();
      {
        const PhaseScope phase(watchdog, RunPhase::saving);
        EXPECT_EQ(read_ledger(rank.ledgers / ledger_file_name(0)).phase, RunPhase::saving);
      }
      EXPECT_EQ(read_ledger(rank.ledgers / ledger_file_name(0)).phase, RunPhase::loading);
      while (!std::filesystem::exists(path)) std::this_thread::yield();
      const nlohmann::json first = read_json(path);
      EXPECT_EQ(first["state"], "running");
      watchdog.finish_update(5, 3.25);
      watchdog.enter(RunPhase::ending);
      if (state != RunState::failed) watchdog.end(state);
    }
    const nlohmann::json last = read_json(path);
    EXPECT_EQ(last["state"], name_of(state));
    EXPECT_EQ(last["phase"], "ending");
    EXPECT_EQ(last["update"], 5);
    EXPECT_EQ(last["updates"], 9);
    EXPECT_EQ(last["loss"], 3.25);
    EXPECT_EQ(last["host"], host_name());
    EXPECT_EQ(last["pid"], getpid());
    EXPECT_EQ(last["attempt"], "17");
    EXPECT_NEAR(last["time"].get<double>(), static_cast<double>(std::time(nullptr)), 60.0);
    std::filesystem::remove(path);
  }
  unsetenv("NORMFORMER_ATTEMPT");
}

TEST(Heartbeat, ALossThatIsNotFiniteIsNull) {
  const auto json = nlohmann::json::parse(to_json({.loss = std::nan("")}));
  EXPECT_TRUE(json["loss"].is_null());
  EXPECT_FALSE(json.contains("attempt"));
}

TEST(Heartbeat, AFailureIsSaidOnceAndNeverThrown) {
  const TemporaryFolder folder;
  HeartbeatFile file(folder / "nowhere" / "heartbeat.json");
  ::testing::internal::CaptureStderr();
  file.write({});
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("no heartbeat"));
  ::testing::internal::CaptureStderr();
  file.write({});
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST_F(WatchdogThatEndsTheJob, SaysWhatTheRankWasAtAndInWhichFunction) {
  EXPECT_EXIT(
      hang(0, 1), ExitedWithCode(76),
      "rank 0 has made no progress for 0.* s .health.watchdog_seconds is 0.3., saving after update 0");
  ASSERT_THAT(reports_in(folder_), SizeIs(1));
  const std::string report = read_bytes(reports_in(folder_)[0]);
  EXPECT_THAT(report, HasSubstr("rank 0 on " + host_name()));
  EXPECT_THAT(report, HasSubstr("WatchdogThatEndsTheJob::hang("));
  EXPECT_THAT(read_bytes(folder_ / "stacks-rank-00000.txt"), HasSubstr("WatchdogThatEndsTheJob::hang("));
  EXPECT_EQ(read_json(folder_ / "heartbeat.json")["state"], "hang");
}

TEST_F(WatchdogThatEndsTheJob, OneRankReportsAndOthersWriteOnlyWhatTheyAreIn) {
  { const Rank other(folder_, 0, 2); }
  write_bytes(folder_ / "ledger/hang-report", "hang-1.txt");
  EXPECT_EXIT(hang(1, 2), ExitedWithCode(76), "^$");
  EXPECT_THAT(reports_in(folder_), IsEmpty());
  EXPECT_THAT(read_bytes(folder_ / "stacks-rank-00001.txt"), HasSubstr("rank 1 has made no progress"));
  std::filesystem::remove(folder_ / "ledger/hang-report");
  EXPECT_EXIT(hang(1, 2), ExitedWithCode(76), "rank 1 has made no progress");
  EXPECT_THAT(reports_in(folder_), SizeIs(1));
}

TEST_F(WatchdogThatEndsTheJob, EvenBeforeThereIsAFolder) {
  EXPECT_EXIT(hang({.limit_seconds = 0.3, .run_folder = "/nowhere", .ledgers = "/nowhere"}, nullptr),
              ExitedWithCode(76), "saving after update 0");
}

// A pipe that nobody reads: whoever opens it for writing waits for ever, as on a disk that does not answer.
TEST_F(WatchdogThatEndsTheJob, EvenWhereTheDiskDoesNotAnswer) {
  mkfifo((folder_ / "stacks-rank-00000.txt").c_str(), 0600);
  EXPECT_EXIT(hang(0, 1), ExitedWithCode(76), "does not answer. Rank 0 is in:");
}

TEST_F(WatchdogThatEndsTheJob, EvenWhereALedgerCannotBeRead) {
  { const Rank other(folder_, 0, 2); }
  write_bytes(folder_ / "ledger/rank-00000.ledger", "no ledger at all");
  EXPECT_EXIT(hang(1, 2), ExitedWithCode(76), "rank-00000.ledger is no ledger of a rank");
}

}  // namespace
}  // namespace normformer
