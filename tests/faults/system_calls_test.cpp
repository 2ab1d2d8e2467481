// Saves through the system's own files while its calls fail, one after another: this program's own
// definitions of these functions come before the C library's.

#include <atomic>
#include <cerrno>
#include <cstdarg>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "normformer/core/error.h"

#include "faults/toy_checkpoint.h"

namespace {

/// What happens to one of the calls that change or sync something.
struct Plan {
  int error = 0;           ///< errno; 0: the call writes a part of what it should
  int64_t at = -1;         ///< the how-manieth call, from 0
  bool and_later = false;  ///< and to all after it that need space
};

std::atomic<bool> armed = false;
std::atomic<int64_t> calls = 0;
Plan plan;

bool is_hit(bool needs_space = true) {
  if (!armed) return false;
  const int64_t now = calls++;
  return now == plan.at || (plan.and_later && now > plan.at && needs_space);
}

template <class... Args>
long call(bool hit, long number, Args... args) {
  if (!hit || plan.error == 0) return syscall(number, args...);
  errno = plan.error;
  return -1;
}

}  // namespace

extern "C" {

ssize_t write(int file, const void* bytes, size_t count) {
  const bool hit = is_hit();
  if (hit && plan.error == 0 && count > 1) count /= 2;
  return call(hit, SYS_write, file, bytes, count);
}

int fsync(int file) { return static_cast<int>(call(is_hit(), SYS_fsync, file)); }

int fallocate(int file, int mode, off_t offset, off_t length) {
  return static_cast<int>(call(is_hit(), SYS_fallocate, file, mode, offset, length));
}

int mkdir(const char* path, mode_t mode) {
  return static_cast<int>(call(is_hit(), SYS_mkdirat, AT_FDCWD, path, mode));
}

int rename(const char* from, const char* to) {
  return static_cast<int>(call(is_hit(), SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

int unlink(const char* path) {
  return static_cast<int>(call(is_hit(false), SYS_unlinkat, AT_FDCWD, path, 0));
}

int rmdir(const char* path) {
  return static_cast<int>(call(is_hit(false), SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  return static_cast<int>(call(is_hit((flags & O_CREAT) != 0), SYS_openat, AT_FDCWD, path, flags, mode));
}

int close(int file) {
  const bool hit = is_hit(false);
  const long closed = syscall(SYS_close, file);  // a failed close has closed, too
  if (!hit || plan.error == 0) return static_cast<int>(closed);
  errno = plan.error;
  return -1;
}

}  // extern "C"

namespace normformer {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SystemCalls : public ::testing::TestWithParam<Plan> {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/system_calls_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    folder_ = root_ / "checkpoints";
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  SaveResult save(int version, int64_t keep) {
    SaveResult results[2];
    run_local_world(2, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const auto pieces = toy_pieces(context, {2, 1}, world.rank(), version, true);
      results[world.rank()] = save_checkpoint(world, *files_, folder_, toy_info(version), pieces,
                                              {.keep = keep, .block_bytes = 4096});
    });
    EXPECT_EQ(results[0].reason, results[1].reason);
    return results[0];
  }

  int newest() {
    Context context(DeviceKind::cpu);
    const auto pieces = toy_pieces(context, {1, 1}, 0, 0, false);
    const auto reader = open_newest_checkpoint(make_self_world(), *files_, folder_,
                                               [&](const CheckpointReader& r) { r.read(pieces); });
    const int version = static_cast<int>(reader->info().update_count);
    EXPECT_EQ(count_wrong(pieces, version), 0);
    return version;
  }

  std::unique_ptr<FileSystem> files_ = make_system_files();
  std::filesystem::path root_;
  std::filesystem::path folder_;
};

TEST_P(SystemCalls, FailOneAfterAnotherAndNothingIsLost) {
  ASSERT_TRUE(save(1, 9));
  int64_t failed_saves = 0;
  int64_t tried = 0;
  for (bool reached = true; reached; ++tried) {
    plan = GetParam();
    plan.at = tried;
    calls = 0;
    armed = true;
    const SaveResult result = save(2, 9);
    armed = false;
    reached = calls > tried;
    const int version = newest();
    // Where the last sync fails and nothing can be taken back either, what is there is complete.
    const bool stays = GetParam().and_later && version == 2;
    EXPECT_TRUE(stays || version == (result ? 2 : 1)) << "call " << tried << ": " << result.reason;
    failed_saves += result ? 0 : 1;
    EXPECT_TRUE(result || GetParam().error != 0) << "call " << tried << ": " << result.reason;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      if (entry.path().filename() != "step-0000000001") std::filesystem::remove_all(entry.path());
    }
  }
  EXPECT_GT(tried, 25);
  EXPECT_GE(failed_saves, GetParam().error != 0 ? 15 : 0);
}

INSTANTIATE_TEST_SUITE_P(Errors, SystemCalls,
                         ::testing::Values(Plan{EIO}, Plan{ENOSPC}, Plan{ENOSPC, -1, true}, Plan{EDQUOT},
                                           Plan{EROFS, -1, true}, Plan{0}));

}  // namespace
}  // namespace normformer
