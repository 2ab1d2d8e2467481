#include "memory_files.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "normformer/core/error.h"

namespace normformer {

namespace fs = std::filesystem;

class MemoryFiles::Writer : public WritableFile {
 public:
  Writer(MemoryFiles& files, Node node, fs::path path) : files_(files), node_(node), path_(std::move(path)) {}

  void reserve(int64_t) override {}
  void append(std::span<const std::byte> bytes) override {
    files_.perform({Operation::Kind::append, node_, "", "", 0,
                    std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())});
  }
  void sync() override { files_.sync(node_, path_); }
  void close() override {}

 private:
  MemoryFiles& files_;
  Node node_;
  fs::path path_;
};

class MemoryFiles::Reader : public ReadableFile {
 public:
  Reader(std::string bytes, fs::path path) : bytes_(std::move(bytes)), path_(std::move(path)) {}
  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  void read(int64_t offset, std::span<std::byte> into) const override {
    if (offset + static_cast<int64_t>(into.size()) > size()) {
      throw IoError(fmt::format("{} ends at byte {}", path_.string(), size()));
    }
    std::memcpy(into.data(), bytes_.data() + offset, into.size());
  }

 private:
  std::string bytes_;
  fs::path path_;
};

MemoryFiles::MemoryFiles() {
  disk_[0].is_folder = true;
  settled_ = disk_;
}

void MemoryFiles::apply(Disk& disk, const Operation& operation) {
  File& file = disk.at(operation.node);
  switch (operation.kind) {
    case Operation::Kind::link:
      file.names[operation.name] = operation.target;
      break;
    case Operation::Kind::unlink:
      file.names.erase(operation.name);
      break;
    case Operation::Kind::rename:
      file.names.erase(operation.name);
      file.names[operation.new_name] = operation.target;
      break;
    case Operation::Kind::append:
      file.bytes += operation.bytes;
      break;
    case Operation::Kind::sync:
      break;
  }
}

void MemoryFiles::perform(Operation operation) {
  const std::lock_guard lock(mutex_);
  apply(disk_, operation);
  log_.push_back(std::move(operation));
}

MemoryFiles::Node MemoryFiles::find(const fs::path& path) const {
  Node node = 0;
  for (const fs::path& part : path.lexically_normal()) {
    if (part.empty() || part == "." || part == "/") continue;
    const File& folder = disk_.at(node);
    const auto found = folder.names.find(part.string());
    if (found == folder.names.end()) return -1;
    node = found->second;
  }
  return node;
}

MemoryFiles::Node MemoryFiles::need(const fs::path& path, const char* action) const {
  const Node node = find(path);
  if (node < 0) throw IoError(fmt::format("cannot {} {}: No such file or directory", action, path.string()));
  return node;
}

MemoryFiles::Node MemoryFiles::need_folder(const fs::path& path, const char* action) const {
  const Node node = need(path, action);
  if (!disk_.at(node).is_folder) {
    throw IoError(fmt::format("cannot {} {}: Not a directory", action, path.string()));
  }
  return node;
}

MemoryFiles::Node MemoryFiles::add(const fs::path& path, bool is_folder) {
  const Node parent = need_folder(path.parent_path(), "create in");
  if (find(path) >= 0) throw IoError(fmt::format("cannot create {}: File exists", path.string()));
  const Node node = next_++;
  disk_[node].is_folder = is_folder;
  perform({Operation::Kind::link, parent, path.filename().string(), "", node, ""});
  return node;
}

void MemoryFiles::remove(const fs::path& path, bool is_folder) {
  const std::lock_guard lock(mutex_);
  const File& file = disk_.at(need(path, "remove"));
  if (file.is_folder != is_folder) throw IoError(fmt::format("cannot remove {}: wrong kind", path.string()));
  if (!file.names.empty()) throw IoError(fmt::format("cannot remove {}: Directory not empty", path.string()));
  perform({Operation::Kind::unlink, find(path.parent_path()), path.filename().string(), "", 0, ""});
}

void MemoryFiles::sync(Node node, const fs::path& path) {
  const std::lock_guard lock(mutex_);
  if (ignored_ && ignored_(path)) return;
  perform({Operation::Kind::sync, node, "", "", 0, ""});
}

std::unique_ptr<WritableFile> MemoryFiles::create(const fs::path& path) {
  const std::lock_guard lock(mutex_);
  return std::make_unique<Writer>(*this, add(path, false), path);
}

std::unique_ptr<ReadableFile> MemoryFiles::open(const fs::path& path) {
  return std::make_unique<Reader>(content(path), path);
}

bool MemoryFiles::exists(const fs::path& path) {
  const std::lock_guard lock(mutex_);
  return find(path) >= 0;
}

std::vector<std::string> MemoryFiles::list(const fs::path& folder) {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [name, node] : disk_.at(need_folder(folder, "list")).names) names.push_back(name);
  return names;
}

void MemoryFiles::make_folder(const fs::path& path) {
  const std::lock_guard lock(mutex_);
  add(path, true);
}

void MemoryFiles::rename(const fs::path& from, const fs::path& to) {
  const std::lock_guard lock(mutex_);
  const Node node = need(from, "rename");
  NF_CHECK(from.parent_path() == to.parent_path(), "renames stay within a folder here");
  if (const Node there = find(to); there >= 0 && disk_.at(there).is_folder) {
    throw IoError(fmt::format("cannot rename {} to {}: Directory not empty", from.string(), to.string()));
  }
  perform({Operation::Kind::rename, find(from.parent_path()), from.filename().string(),
           to.filename().string(), node, ""});
}

void MemoryFiles::sync_folder(const fs::path& folder) {
  const std::lock_guard lock(mutex_);
  sync(need_folder(folder, "sync the folder"), folder);
}

void MemoryFiles::remove_file(const fs::path& path) { remove(path, false); }

void MemoryFiles::remove_folder(const fs::path& path) { remove(path, true); }

std::string& MemoryFiles::content(const fs::path& path) {
  const std::lock_guard lock(mutex_);
  File& file = disk_.at(need(path, "open"));
  if (file.is_folder) throw IoError(fmt::format("{} is not a regular file", path.string()));
  return file.bytes;
}

std::unique_ptr<MemoryFiles> MemoryFiles::image(Disk disk) {
  auto files = std::make_unique<MemoryFiles>();
  files->next_ = disk.rbegin()->first + 1;
  files->disk_ = std::move(disk);
  files->settle();
  return files;
}

std::unique_ptr<MemoryFiles> MemoryFiles::copy() {
  const std::lock_guard lock(mutex_);
  return image(disk_);
}

void MemoryFiles::settle() {
  settled_ = disk_;
  log_.clear();
}

void MemoryFiles::for_each_crash(int64_t operations, const std::function<void(MemoryFiles&)>& visit) const {
  // What no sync before the cut has made durable: each a name that may be undone, or bytes of a file.
  std::vector<size_t> loose_names;
  std::set<Node> loose_files;
  std::set<Node> synced;
  for (size_t i = static_cast<size_t>(operations); i-- > 0;) {
    const Operation& operation = log_[i];
    if (operation.kind == Operation::Kind::sync) {
      synced.insert(operation.node);
    } else if (synced.contains(operation.node)) {
      continue;
    } else if (operation.kind == Operation::Kind::append) {
      loose_files.insert(operation.node);
    } else {
      loose_names.push_back(i);
    }
  }
  NF_CHECK(loose_names.size() <= 12, "{} names at once are not durable", loose_names.size());

  enum class Bytes { none, half, zeros, all };
  for (const Bytes kept : {Bytes::none, Bytes::half, Bytes::zeros, Bytes::all}) {
    if (loose_files.empty() && kept != Bytes::all) continue;
    for (uint64_t subset = 0; subset < uint64_t{1} << loose_names.size(); ++subset) {
      std::set<size_t> undone;
      for (size_t n = 0; n < loose_names.size(); ++n) {
        if ((subset >> n & 1) == 0) undone.insert(loose_names[n]);
      }
      Disk disk = settled_;
      for (const auto& [node, file] : disk_) disk[node].is_folder = file.is_folder;
      std::map<Node, size_t> durable;  // bytes of loose files up to their last sync
      for (const Node node : loose_files) durable[node] = disk[node].bytes.size();
      for (size_t i = 0; i < static_cast<size_t>(operations); ++i) {
        if (undone.contains(i)) continue;
        apply(disk, log_[i]);
        if (log_[i].kind == Operation::Kind::sync && durable.contains(log_[i].node)) {
          durable[log_[i].node] = disk.at(log_[i].node).bytes.size();
        }
      }
      for (const auto& [node, size] : durable) {
        std::string& bytes = disk.at(node).bytes;
        const size_t middle = size + (bytes.size() - size) / 2;
        if (kept == Bytes::none) bytes.resize(size);
        if (kept == Bytes::half) bytes.resize(middle);
        if (kept == Bytes::zeros) std::fill(bytes.begin() + static_cast<int64_t>(middle), bytes.end(), '\0');
      }
      visit(*image(std::move(disk)));
    }
  }
}

}  // namespace normformer
