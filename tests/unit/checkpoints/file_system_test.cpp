#include "normformer/core/file_system.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

template <class Body>
std::string refusal(Body&& body) {
  try {
    body();
  } catch (const IoError& e) {
    return e.what();
  }
  return "";
}

TEST(SystemFiles, EveryRefusalNamesTheFileAndTheReason) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  const std::string missing = (folder / "missing").string();
  const std::string there = (folder / "there").string();
  files->create(there)->append(as_bytes("x"));
  EXPECT_EQ(refusal([&] { files->open(missing); }), "cannot open " + missing + ": No such file or directory");
  EXPECT_EQ(refusal([&] { files->create(there); }), "cannot create " + there + ": File exists");
  EXPECT_EQ(refusal([&] { files->list(missing); }), "cannot list " + missing + ": No such file or directory");
  EXPECT_EQ(refusal([&] { files->make_folder(there); }), "cannot make the folder " + there + ": File exists");
  EXPECT_EQ(refusal([&] { files->sync_folder(there); }),
            "cannot open the folder " + there + ": Not a directory");
  EXPECT_EQ(refusal([&] { files->remove_file(missing); }),
            "cannot remove " + missing + ": No such file or directory");
  EXPECT_EQ(refusal([&] { files->remove_folder(folder.path()); }),
            "cannot remove the folder " + folder.path().string() + ": Directory not empty");
  EXPECT_EQ(refusal([&] { files->rename(missing, there); }),
            "cannot rename " + missing + " to " + there + ": No such file or directory");
  EXPECT_EQ(refusal([&] { files->open(folder.path()); }), folder.path().string() + " is not a regular file");
  std::byte two[2];
  EXPECT_EQ(refusal([&] { files->open(there)->read(0, two); }), there + " ends at byte 1");
}

TEST(SystemFiles, PipesAndLinksAreNotFiles) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(refusal([&] { files->open(folder / "pipe"); }), HasSubstr("is not a regular file"));
  files->create(folder / "file");
  std::filesystem::create_symlink("file", folder / "link");
  EXPECT_THAT(refusal([&] { files->open(folder / "link"); }), HasSubstr("Too many levels of symbolic links"));
  EXPECT_THAT(refusal([&] { files->create(folder / "link"); }), HasSubstr("File exists"));
}

TEST(SystemFiles, AFullDiskIsToldInTime) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  const auto file = files->create(folder / "file");
  EXPECT_THAT(refusal([&] { file->reserve(int64_t{1} << 60); }),
              StartsWith("cannot set space aside for " + (folder / "file").string()));
}

// Large files take another way to the disk: in parts of any size, synced in the middle, to an end at any
// byte.
TEST(SystemFiles, LargeFilesHoldWhatWasAppended) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  std::string content((size_t{21} << 20) + 77, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 2654435761u >> 13);
  const auto file = files->create(folder / "large");
  file->reserve(static_cast<int64_t>(content.size()));
  size_t at = 0;
  for (size_t part = 1; at < content.size(); part = part * 3 + 1) {
    const size_t bytes = std::min(part, content.size() - at);
    file->append(as_bytes(std::string_view(content).substr(at, bytes)));
    at += bytes;
    if (part > (1 << 20) && part < (4 << 20)) file->sync();
  }
  file->sync();
  file->close();
  EXPECT_TRUE(read_whole_file(*files, folder / "large", int64_t{1} << 30) == content);
}

TEST(SystemFiles, WritesDurablyAndRemoves) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  const auto deep = folder / "a/b/c/";
  make_folders(*files, deep);
  make_folders(*files, deep);
  write_durably(*files, deep / "text", "first");
  write_durably(*files, deep / "text", "second");
  EXPECT_EQ(read_whole_file(*files, deep / "text", 6), "second");
  EXPECT_THROW(read_whole_file(*files, deep / "text", 5), DataError);
  EXPECT_THAT(files->list(deep), ElementsAre("text"));
  remove_folder_durably(*files, folder / "a/b/c");
  EXPECT_THAT(files->list(folder / "a/b"), ElementsAre());
}

}  // namespace
}  // namespace normformer
