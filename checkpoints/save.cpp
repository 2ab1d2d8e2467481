#include <map>
#include <utility>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/log.h"

#include "agree.h"
#include "blocks.h"
#include "manifest.h"
#include "run_folder.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

/// One save, as one rank goes through it.
class Save {
 public:
  Save(const Group& world, FileSystem& files, fs::path folder, int64_t updates)
      : world_(world), files_(files), folder_(std::move(folder)), name_{updates, 1} {}

  /// Rank 0 makes the folder that all write into, and tells its name.
  std::string prepare() {
    const std::string failure = root_failure(world_, [&] {
      make_folders(files_, folder_);
      remove_leftovers(files_, folder_);
      name_ = next_name(files_, folder_, name_.updates);
      files_.make_folder(temporary());
    });
    if (!failure.empty()) return failure;
    name_ =
        *parse_checkpoint_name(world_.all_gather_text(world_.rank() == 0 ? to_string(name_) : "").front());
    return "";
  }

  /// Every rank writes its file; all learn of all.
  std::string write(std::span<const TensorPiece> mine, int64_t block_bytes) {
    RankReport report;
    report.failure = failure_of([&] {
      const std::string file = fmt::format("rank-{:05}-of-{:05}.bin", world_.rank(), world_.size());
      report = write_pieces(files_, temporary() / file, mine, block_bytes);
      files_.sync_folder(temporary());
    });
    std::vector<std::string> failures;
    for (const std::string& bytes : world_.all_gather_text(write_report(report))) {
      reports_.push_back(read_report(bytes));
      failures.push_back(reports_.back().failure);
    }
    return first_failure(failures);
  }

  /// Rank 0 writes the manifest and gives the checkpoint its name.
  std::string publish(const Manifest& manifest) {
    return root_failure(world_, [&] {
      const auto file = files_.create(temporary() / kManifestName);
      file->append(as_bytes(write_manifest(manifest)));
      file->sync();
      file->close();
      files_.sync_folder(temporary());
      files_.rename(temporary(), result());
      files_.sync_folder(folder_);
    });
  }

  /// Rank 0 removes what was written.
  void drop() {
    if (world_.rank() != 0) return;
    const std::string failure = failure_of([&] {
      if (files_.exists(temporary())) remove_folder_and_files(files_, temporary());
      if (files_.exists(result())) remove_folder_durably(files_, result());
    });
    if (!failure.empty()) log_rank(LogLevel::warning, "what a failed save wrote stays: {}", failure);
  }

  const std::vector<RankReport>& reports() const { return reports_; }
  const CheckpointName& name() const { return name_; }
  fs::path result() const { return folder_ / to_string(name_); }

 private:
  fs::path temporary() const { return temporary_folder(folder_, name_); }

  const Group& world_;
  FileSystem& files_;
  fs::path folder_;
  CheckpointName name_;
  std::vector<RankReport> reports_;
};

/// The manifest of what the ranks wrote. LogicError where they do not agree on a tensor.
Manifest merge(const CheckpointInfo& info, const std::vector<RankReport>& reports, int64_t block_bytes) {
  Manifest manifest;
  manifest.info = info;
  manifest.block_bytes = block_bytes;
  std::map<std::pair<std::string, Role>, StoredTensor> tensors;
  for (const RankReport& report : reports) {
    if (report.file.name.empty()) continue;
    for (const StoredTensor& part : report.tensors) {
      StoredTensor& whole =
          tensors.try_emplace({part.info.name, part.info.role}, StoredTensor{part.info, {}}).first->second;
      NF_CHECK(whole.info.dtype == part.info.dtype && whole.info.rows == part.info.rows &&
                   whole.info.columns == part.info.columns,
               "ranks save '{}' with different shapes or types", part.info.name);
      for (StoredPiece piece : part.pieces) {
        piece.file = static_cast<int64_t>(manifest.files.size());
        whole.pieces.push_back(std::move(piece));
      }
    }
    manifest.files.push_back(report.file);
  }
  for (auto& [key, tensor] : tensors) manifest.tensors.push_back(std::move(tensor));
  return manifest;
}

/// LogicError where an element is in no piece, or in two.
void check_cover(const Manifest& manifest) {
  for (const StoredTensor& tensor : manifest.tensors) {
    std::vector<PiecePlace> places;
    for (const StoredPiece& piece : tensor.pieces) places.push_back(piece.place);
    const std::string fault = find_cover_fault(tensor.info.rows, tensor.info.columns, places);
    NF_CHECK(fault.empty(), "ranks save '{}' ({}) in pieces that do not fit: {}", tensor.info.name,
             name_of(tensor.info.role), fault);
  }
}

}  // namespace

SaveResult save_checkpoint(const Group& world, FileSystem& files, const fs::path& folder,
                           const CheckpointInfo& info, std::span<const TensorPiece> mine, int64_t keep,
                           int64_t block_bytes) {
  NF_CHECK(keep >= 1, "{} checkpoints to keep", keep);
  NF_CHECK(is_block_size(block_bytes), "blocks of {} bytes", block_bytes);
  for (const TensorPiece& piece : mine) check_piece(piece);
  Save save(world, files, folder, info.update_count);
  SaveResult result;
  result.reason = save.prepare();
  if (result.reason.empty()) result.reason = save.write(mine, block_bytes);
  if (result.reason.empty()) {
    Manifest manifest;
    const std::string fault = root_failure(world, [&] {
      manifest = merge(info, save.reports(), block_bytes);
      check_cover(manifest);
    });
    if (!fault.empty()) save.drop();
    NF_CHECK(fault.empty(), "{}", fault);
    result.reason = save.publish(manifest);
  }
  result.folder = save.result();
  result.saved = result.reason.empty();
  for (const RankReport& report : save.reports()) result.bytes += report.file.bytes;
  if (!result.saved) {
    save.drop();
  } else if (world.rank() == 0) {
    retain(files, folder, save.name(), keep);
  }
  return result;
}

}  // namespace normformer
