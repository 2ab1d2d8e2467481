#include <algorithm>
#include <charconv>
#include <chrono>
#include <future>
#include <map>
#include <utility>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/activity.h"
#include "normformer/core/log.h"

#include "agree.h"
#include "blocks.h"
#include "manifest.h"
#include "run_folder.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

bool is_ready(const auto& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

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

// Throws IoError where a later start of the run has begun to use the folder.
void check_attempt(FileSystem& files, const fs::path& folder, int64_t mine) {
  if (mine == 0 || !files.exists(folder / kAttemptName)) return;
  const std::string text = read_whole_file(files, folder / kAttemptName, 64);
  int64_t newest = 0;
  std::from_chars(text.data(), text.data() + text.size(), newest);
  if (newest > mine) {
    throw IoError(
        fmt::format("{} says that attempt {} of this run has begun; this is attempt {}, which writes nothing "
                    "any more",
                    (folder / kAttemptName).string(), newest, mine));
  }
}

/// What became of rank 0's publishing.
struct Publication {
  std::string fault;    ///< a bug: ranks saved what does not fit; "" for none
  std::string failure;  ///< of the disk; "" for none
  double seconds = 0.0;

  std::string encode() const { return fmt::format("{} {} {}{}", seconds, fault.size(), fault, failure); }

  static Publication decode(const std::string& text) {
    Publication decoded;
    const size_t space = text.find(' ');
    const size_t second = text.find(' ', space + 1);
    decoded.seconds = std::stod(text.substr(0, space));
    const size_t length = std::stoul(text.substr(space + 1, second - space - 1));
    decoded.fault = text.substr(second + 1, length);
    decoded.failure = text.substr(second + 1 + length);
    return decoded;
  }
};

}  // namespace

/// One rank's part in saves.
class CheckpointWriter::Impl {
 public:
  Impl(Group world, FileSystem& files, fs::path folder, const SaveOptions& options)
      : world_(std::move(world)), files_(files), folder_(std::move(folder)), options_(options) {
    NF_CHECK(options.keep >= 1, "{} checkpoints to keep", options.keep);
    NF_CHECK(is_block_size(options.block_bytes), "blocks of {} bytes", options.block_bytes);
  }
  ~Impl() {
    if (ring_) ring_->stop();
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::optional<SaveResult> begin(const CheckpointInfo& info, std::span<const TensorPiece> mine);
  bool in_flight() const { return stage_ != Stage::idle; }
  int64_t progress();
  std::optional<SaveResult> advance(int64_t progress_of_all);
  SaveResult finish();

 private:
  enum class Stage { idle, writing, publishing };

  std::string prepare(int64_t updates);
  void stage(std::span<const TensorPiece> mine);
  RankReport write(const std::vector<PieceOutline>& outlines);
  std::optional<SaveResult> exchange_reports();
  Publication publish(const std::vector<RankReport>& reports);
  void write_manifest_and_rename(const Manifest& manifest);
  SaveResult conclude();
  SaveResult end(const std::string& reason);
  void drop();
  void begin_thread() const;
  fs::path temporary() const { return temporary_folder(folder_, name_); }

  Group world_;
  FileSystem& files_;
  fs::path folder_;
  SaveOptions options_;
  Stage stage_ = Stage::idle;
  int64_t ended_ = 0;  // saves
  CheckpointInfo info_;
  CheckpointName name_;
  SaveResult result_;
  double copy_seconds_ = 0.0;
  ActivityCounter* activity_ = nullptr;  // of the thread that began the save
  std::unique_ptr<StagingRing> ring_;
  std::future<RankReport> writing_;
  std::future<Publication> publishing_;  // rank 0's
};

// Rank 0 makes the folder that all write into, and tells its name.
std::string CheckpointWriter::Impl::prepare(int64_t updates) {
  const std::string failure = root_failure(world_, [&] {
    make_folders(files_, folder_);
    check_attempt(files_, folder_, options_.attempt);
    remove_leftovers(files_, folder_);
    name_ = next_name(files_, folder_, updates);
    files_.make_folder(temporary());
  });
  if (!failure.empty()) return failure;
  name_ = *parse_checkpoint_name(world_.all_gather_text(world_.rank() == 0 ? to_string(name_) : "").front());
  return "";
}

std::optional<SaveResult> CheckpointWriter::Impl::begin(const CheckpointInfo& info,
                                                        std::span<const TensorPiece> mine) {
  NF_CHECK(!in_flight(), "a save begins while one is on its way");
  for (const TensorPiece& piece : mine) check_piece(piece);
  const Stopwatch agreeing;
  activity_ = activity_counter();
  info_ = info;
  result_ = {};
  result_.update_count = info.update_count;
  if (const std::string failure = prepare(info.update_count); !failure.empty()) return end(failure);
  result_.folder = folder_ / to_string(name_);
  result_.times.agree = agreeing.seconds();
  stage_ = Stage::writing;
  stage(mine);
  return std::nullopt;
}

// Starts the thread that writes and hands it the values.
void CheckpointWriter::Impl::stage(std::span<const TensorPiece> mine) {
  std::vector<PieceOutline> outlines = outlines_of(mine);
  int64_t bytes = 0;
  for (const PieceOutline& outline : outlines) bytes += outline.bytes();
  const int64_t wanted = options_.staging_for(bytes);
  if (ring_ == nullptr || ring_->capacity() < wanted) ring_ = std::make_unique<StagingRing>(wanted);
  ring_->restart();
  const Stopwatch copying;
  writing_ =
      std::async(std::launch::async, [this, outlines = std::move(outlines)] { return write(outlines); });
  try {
    stage_pieces(*ring_, mine, options_.block_bytes);
  } catch (...) {
    ring_->stop();
    throw;
  }
  copy_seconds_ = copying.seconds();
}

RankReport CheckpointWriter::Impl::write(const std::vector<PieceOutline>& outlines) {
  begin_thread();
  const Stopwatch writing;
  RankReport report;
  // Whatever ends the writing, nobody must wait for room in the ring any more.
  const std::unique_ptr<StagingRing, void (*)(StagingRing*)> stopped(ring_.get(),
                                                                     [](StagingRing* ring) { ring->stop(); });
  report.failure = failure_of([&] {
    const std::string file = fmt::format("rank-{:05}-of-{:05}.bin", world_.rank(), world_.size());
    report = write_staged(files_, temporary() / file, outlines, *ring_, options_.block_bytes);
    files_.sync_folder(temporary());
  });
  report.write_seconds = writing.seconds();
  return report;
}

int64_t CheckpointWriter::Impl::progress() {
  const bool done = (stage_ == Stage::writing && is_ready(writing_)) ||
                    (stage_ == Stage::publishing && (world_.rank() != 0 || is_ready(publishing_)));
  return 2 * ended_ + (stage_ == Stage::publishing ? 1 : 0) + (done ? 1 : 0);
}

std::optional<SaveResult> CheckpointWriter::Impl::advance(int64_t progress_of_all) {
  if (stage_ == Stage::writing && progress_of_all > 2 * ended_) return exchange_reports();
  if (stage_ == Stage::publishing && progress_of_all > 2 * ended_ + 1) return conclude();
  return std::nullopt;
}

SaveResult CheckpointWriter::Impl::finish() {
  NF_CHECK(in_flight(), "no save is on its way");
  if (stage_ == Stage::writing) {
    if (const std::optional<SaveResult> failed = exchange_reports()) return *failed;
  }
  return conclude();
}

// All learn of all files; rank 0 starts to publish them.
std::optional<SaveResult> CheckpointWriter::Impl::exchange_reports() {
  RankReport mine = writing_.get();
  mine.copy_seconds = copy_seconds_;
  std::vector<RankReport> reports;
  std::vector<std::string> failures;
  for (const std::string& bytes : world_.all_gather_text(write_report(mine))) {
    reports.push_back(read_report(bytes));
    const RankReport& report = reports.back();
    failures.push_back(report.failure);
    result_.bytes += report.file.bytes;
    result_.times.copy = std::max(result_.times.copy, report.copy_seconds);
    result_.times.write = std::max(result_.times.write, report.write_seconds);
  }
  if (const std::string failure = first_failure(failures); !failure.empty()) {
    drop();
    return end(failure);
  }
  stage_ = Stage::publishing;
  if (world_.rank() != 0) return std::nullopt;
  publishing_ = std::async(std::launch::async, [this, reports = std::move(reports)] {
    begin_thread();
    return publish(reports);
  });
  return std::nullopt;
}

// Rank 0 writes the manifest, gives the checkpoint its name and removes what is too old.
Publication CheckpointWriter::Impl::publish(const std::vector<RankReport>& reports) {
  const Stopwatch publishing;
  Publication publication;
  Manifest manifest;
  publication.fault = failure_of([&] {
    manifest = merge(info_, reports, options_.block_bytes);
    check_cover(manifest);
  });
  if (publication.fault.empty())
    publication.failure = failure_of([&] { write_manifest_and_rename(manifest); });
  if (!publication.fault.empty() || !publication.failure.empty()) {
    drop();
  } else {
    retain(files_, folder_, name_, options_.keep, options_.keep_every);
  }
  publication.seconds = publishing.seconds();
  return publication;
}

void CheckpointWriter::Impl::write_manifest_and_rename(const Manifest& manifest) {
  const auto file = files_.create(temporary() / kManifestName);
  file->append(as_bytes(write_manifest(manifest)));
  file->sync();
  file->close();
  files_.sync_folder(temporary());
  check_attempt(files_, folder_, options_.attempt);
  files_.rename(temporary(), result_.folder);
  files_.sync_folder(folder_);
}

// All learn what became of the publishing.
SaveResult CheckpointWriter::Impl::conclude() {
  const std::string mine = world_.rank() == 0 ? publishing_.get().encode() : "";
  const Publication publication = Publication::decode(world_.all_gather_text(mine).front());
  result_.times.publish = publication.seconds;
  const SaveResult result = end(publication.failure.empty() ? "" : "rank 0: " + publication.failure);
  NF_CHECK(publication.fault.empty(), "{}", publication.fault);
  return result;
}

SaveResult CheckpointWriter::Impl::end(const std::string& reason) {
  stage_ = Stage::idle;
  ++ended_;
  result_.reason = reason;
  result_.saved = reason.empty();
  return result_;
}

// Rank 0 removes what was written.
void CheckpointWriter::Impl::drop() {
  if (world_.rank() != 0) return;
  const std::string failure = failure_of([&] {
    if (files_.exists(temporary())) remove_folder_and_files(files_, temporary());
    if (files_.exists(result_.folder)) remove_folder_durably(files_, result_.folder);
  });
  if (!failure.empty()) log_rank(LogLevel::warning, "what a failed save wrote stays: {}", failure);
}

// What a thread of this rank does counts as the rank's, whoever watches it.
void CheckpointWriter::Impl::begin_thread() const {
  if (world_.size() > 1) set_rank_label(world_.rank(), host_name());
  count_activity_in(activity_);
}

CheckpointWriter::CheckpointWriter(Group world, FileSystem& files, fs::path folder,
                                   const SaveOptions& options)
    : impl_(std::make_unique<Impl>(std::move(world), files, std::move(folder), options)) {}
CheckpointWriter::~CheckpointWriter() = default;
std::optional<SaveResult> CheckpointWriter::begin(const CheckpointInfo& info,
                                                  std::span<const TensorPiece> mine) {
  return impl_->begin(info, mine);
}
bool CheckpointWriter::in_flight() const { return impl_->in_flight(); }
int64_t CheckpointWriter::progress() { return impl_->progress(); }
std::optional<SaveResult> CheckpointWriter::advance(int64_t progress_of_all) {
  return impl_->advance(progress_of_all);
}
SaveResult CheckpointWriter::finish() { return impl_->finish(); }

SaveResult save_checkpoint(const Group& world, FileSystem& files, const fs::path& folder,
                           const CheckpointInfo& info, std::span<const TensorPiece> mine,
                           const SaveOptions& options) {
  CheckpointWriter writer(world, files, folder, options);
  if (const std::optional<SaveResult> failed = writer.begin(info, mine)) return *failed;
  return writer.finish();
}

}  // namespace normformer
