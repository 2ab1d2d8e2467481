#include "normformer/core/kept_choices.h"

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

namespace normformer {
namespace {

namespace fs = std::filesystem;

class KeptChoicesTest : public testing::Test {
 protected:
  KeptChoicesTest() {
    std::string name = (fs::temp_directory_path() / "kept_choices_XXXXXX").string();
    folder_ = mkdtemp(name.data());
  }
  ~KeptChoicesTest() override { fs::remove_all(folder_); }

  fs::path file() const { return folder_ / "cache" / "choices"; }

  std::string text() const {
    std::ifstream stream(file());
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  fs::path folder_;
};

std::string never() {
  ADD_FAILURE() << "chosen anew";
  return "";
}

TEST_F(KeptChoicesTest, TheFirstChoiceStays) {
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a b", [] { return "1 2"; }), "1 2");
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a", [] { return ""; }), "");
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a b", never), "1 2");
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a", never), "");
  EXPECT_EQ(text(), "a b\t1 2\na\t\n");
}

TEST_F(KeptChoicesTest, ALineThatWasCutOffIsNoChoice) {
  KeptChoices(file()).find_or_choose("a", [] { return "1"; });
  std::ofstream(file(), std::ios::app) << "b\t12";
  EXPECT_EQ(KeptChoices(file()).find_or_choose("b", [] { return "123"; }), "123");
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a", never), "1");
  EXPECT_EQ(KeptChoices(file()).find_or_choose("b", never), "123");
  EXPECT_EQ(text(), "a\t1\nb\t12\nb\t123\n");
}

TEST_F(KeptChoicesTest, WithoutAFileThereIsNoChoice) {
  std::ofstream(folder_ / "cache") << "a file where the folder would be";
  EXPECT_EQ(KeptChoices(file()).find_or_choose("a", never), std::nullopt);
}

TEST_F(KeptChoicesTest, AFailureToChooseKeepsNothing) {
  KeptChoices choices(file());
  EXPECT_THROW(choices.find_or_choose("a", []() -> std::string { throw std::runtime_error("no"); }),
               std::runtime_error);
  EXPECT_EQ(choices.find_or_choose("a", [] { return "1"; }), "1");
}

TEST_F(KeptChoicesTest, ThreadsChooseOnce) {
  std::atomic<int> chosen = 0;
  std::vector<std::optional<std::string>> found(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < found.size(); ++i) {
    threads.emplace_back([&, i] {
      found[i] = KeptChoices(file()).find_or_choose("key", [&] { return std::to_string(++chosen); });
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(chosen, 1);
  for (const auto& choice : found) EXPECT_EQ(choice, "1");
}

TEST_F(KeptChoicesTest, ProcessesChooseAlike) {
  const int children = 6;
  for (int i = 0; i < children; ++i) {
    if (fork() != 0) continue;
    KeptChoices choices(file());
    for (int key = 0; key < 20; ++key) {
      choices.find_or_choose(std::to_string(key), [&] { return std::to_string(i); });
    }
    _exit(0);
  }
  for (int i = 0; i < children; ++i) {
    int status = -1;
    ASSERT_GT(wait(&status), 0);
    EXPECT_EQ(status, 0);
  }
  const std::string lines = text();
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), 20);
}

TEST(CacheFolder, IsTheUsersOwn) {
  setenv("HOME", "/home/someone", 1);
  unsetenv("XDG_CACHE_HOME");
  unsetenv("NORMFORMER_CACHE");
  EXPECT_EQ(cache_folder(), "/home/someone/.cache/normformer");
  setenv("XDG_CACHE_HOME", "/var/cache/someone", 1);
  EXPECT_EQ(cache_folder(), "/var/cache/someone/normformer");
  setenv("NORMFORMER_CACHE", "/fast/disk", 1);
  EXPECT_EQ(cache_folder(), "/fast/disk");
  for (const char* name : {"HOME", "XDG_CACHE_HOME", "NORMFORMER_CACHE"}) unsetenv(name);
  EXPECT_EQ(cache_folder(), std::nullopt);
}

}  // namespace
}  // namespace normformer
