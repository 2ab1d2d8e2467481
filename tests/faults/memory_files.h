#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "normformer/core/file_system.h"

namespace normformer {

/// Files in memory that remember, of everything done to them, what a power cut could still undo.
///
/// The model is POSIX at its strictest: syncing a file makes its bytes durable but not its name, syncing a
/// folder makes the names in it durable, and nothing else is: of names made, renamed and removed since, any
/// subset may survive, and of bytes appended since, none, a part, or zeros in place of the rest. As in
/// LevelDB's FaultInjectionTestEnv and the crash states of ALICE (Pillai et al., OSDI 2014).
class MemoryFiles : public FileSystem {
 public:
  MemoryFiles();

  std::unique_ptr<WritableFile> create(const std::filesystem::path& path) override;
  std::unique_ptr<ReadableFile> open(const std::filesystem::path& path) override;
  bool exists(const std::filesystem::path& path) override;
  std::vector<std::string> list(const std::filesystem::path& folder) override;
  void make_folder(const std::filesystem::path& path) override;
  void rename(const std::filesystem::path& from, const std::filesystem::path& to) override;
  void sync_folder(const std::filesystem::path& folder) override;
  void remove_file(const std::filesystem::path& path) override;
  void remove_folder(const std::filesystem::path& path) override;

  /// The content of a file, to be changed at will.
  std::string& content(const std::filesystem::path& path);

  /// Another disk with the same files, all durable.
  std::unique_ptr<MemoryFiles> copy();

  /// Takes everything done so far as durable.
  void settle();

  /// Lets syncs of these paths return without having any effect.
  void ignore_syncs(std::function<bool(const std::filesystem::path&)> which) { ignored_ = std::move(which); }

  /// How many operations were logged since settle().
  int64_t operations() const { return static_cast<int64_t>(log_.size()); }

  /// Calls visit with each disk that a power cut after the first `operations` logged operations may leave.
  void for_each_crash(int64_t operations, const std::function<void(MemoryFiles&)>& visit) const;

 private:
  using Node = int64_t;
  struct File {
    bool is_folder = false;
    std::string bytes;
    std::map<std::string, Node> names;
  };
  struct Operation {
    enum class Kind { link, unlink, rename, append, sync } kind;
    Node node = 0;  ///< the folder or file that is changed or synced
    std::string name;
    std::string new_name;
    Node target = 0;
    std::string bytes;
  };
  using Disk = std::map<Node, File>;
  class Writer;
  class Reader;

  static void apply(Disk& disk, const Operation& operation);
  static std::unique_ptr<MemoryFiles> image(Disk disk);
  void perform(Operation operation);
  Node find(const std::filesystem::path& path) const;
  Node need(const std::filesystem::path& path, const char* action) const;
  Node need_folder(const std::filesystem::path& path, const char* action) const;
  Node add(const std::filesystem::path& path, bool is_folder);
  void remove(const std::filesystem::path& path, bool is_folder);
  void sync(Node node, const std::filesystem::path& path);

  std::recursive_mutex mutex_;
  Disk settled_;  // what was durable at settle()
  Disk disk_;     // what is seen now
  Node next_ = 1;
  std::vector<Operation> log_;
  std::function<bool(const std::filesystem::path&)> ignored_;
};

}  // namespace normformer
