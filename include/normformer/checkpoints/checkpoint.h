#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"
#include "normformer/core/file_system.h"
#include "normformer/tensor/rectangle.h"
#include "normformer/tensor/tensor.h"

namespace normformer {

/// What values of a parameter a checkpoint's tensor holds.
enum class Role {
  parameter,  ///< in the type that the model computes in
  master,     ///< the optimizer's copy in the accumulator type
  moment1,    ///< Adam's first moment
  moment2,    ///< Adam's second moment
};

/// "parameter", "master", ...
std::string_view name_of(Role role);

/// A run of elements of one logical tensor: what a rank owns when saving, or wants when reading. The logical
/// tensor is named by name and role together.
struct TensorPiece {
  std::string name;
  Role role = Role::parameter;
  Rectangle rectangle;  ///< a part of the logical matrix
  Range range;          ///< the elements of that part, flattened row by row, that this piece is
  Tensor data;          ///< range.size() elements on the CPU, of the logical tensor's type
};

/// What a checkpoint knows of its run beside tensors.
struct CheckpointInfo {
  std::string run_id;            ///< the same for all checkpoints of one run
  int64_t update_count = 0;      ///< updates made: schedules and Adam go on from here; names the checkpoint
  int64_t batch_index = 0;       ///< global batches taken: data and dropout go on from here
  int64_t skipped_in_a_row = 0;  ///< batches since the last update
  int64_t tokens_seen = 0;       ///< targets that counted
  int64_t consumed_samples = 0;  ///< sequences taken from the training set
  uint64_t seed = 0;             ///< of every random number
  std::string config_toml;       ///< the resolved configuration
  std::string tokenizer_hash;    ///< of the tokenizer that the tokens are of
  std::map<std::string, double> metrics;   ///< "loss", ... when it was saved
  std::map<std::string, int64_t> layout;   ///< "tensor", "pipeline", ...: for people; reading needs none
  double loss_scale = 0.0;                 ///< dynamic loss scaling: a power of two; 0 where the run has none
  int64_t clean_updates = 0;               ///< updates since the scale doubled or a batch overflowed
  int64_t overflows = 0;                   ///< batches of the whole run that were skipped for an overflow
  std::vector<double> recent_losses = {};  ///< what spikes are told by, oldest first; none where none are
  std::vector<double> recent_gradient_norms = {};  ///< of the same batches
  std::vector<double> trend_losses = {};   ///< of the newest updates, where an explosion is looked for
  std::optional<double> lowest_loss = {};  ///< the lowest mean over such a window
  uint64_t data_fingerprint = 0;           ///< TokenDataset::fingerprint of what it trains on; 0: not known
  bool operator==(const CheckpointInfo&) const = default;
};

/// One logical tensor of a checkpoint.
struct StoredTensorInfo {
  std::string name;
  Role role = Role::parameter;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t columns = 1;  ///< 1 for a vector
};

/// A checkpoint whose files are not what was written: missing, torn, or changed. Another one may be tried.
class DamagedCheckpoint : public DataError {
 public:
  using DataError::DataError;
};

/// How checkpoints are written, and which stay.
struct SaveOptions {
  int64_t keep = 3;        ///< the newest so many stay; at least 1
  int64_t keep_every = 0;  ///< those after a multiple of so many updates stay for ever, too; 0: none
  /// So many bytes (a multiple of 8, at most 64 MiB) of a piece have a checksum: what a reader must read to
  /// have one element of them, and the size of its buffer.
  int64_t block_bytes = int64_t{4} << 20;
  /// Memory of a rank for values on their way to the disk, at least two blocks; 0: as much as it saves.
  int64_t staging_bytes = 0;

  /// The memory that a rank takes for that, which saves `bytes`.
  int64_t staging_for(int64_t bytes) const {
    return staging_bytes == 0 ? bytes : std::max(staging_bytes, 2 * block_bytes);
  }

  /// Which start of the run this is. Where the folder's file ATTEMPT holds a larger number another one has
  /// begun since, and nothing is written or removed any more. 0: no such file is looked for.
  int64_t attempt = 0;
};

/// How long a save took, in seconds; the slowest rank's.
struct SaveTimes {
  double agree = 0.0;    ///< training stood still for all ranks to know the folder
  double copy = 0.0;     ///< training stood still for the copy
  double write = 0.0;    ///< beside training: from the first byte to the end of the sync
  double publish = 0.0;  ///< beside training: manifest, rename and removal of what is too old
};

/// What became of a save, the same on every rank.
struct SaveResult {
  bool saved = false;
  std::string reason;  ///< why not, in one sentence that names the first rank that failed; "" if saved
  std::filesystem::path folder;  ///< the checkpoint
  int64_t update_count = 0;      ///< that it was to be of
  int64_t bytes = 0;             ///< of its data files
  SaveTimes times;
  explicit operator bool() const { return saved; }
};

/// Writes checkpoints of one run into new folders "step-<updates>" of a folder (made where absent) beside
/// what the ranks compute. Each rank writes one data file with the pieces that it owns; each scalar of a
/// logical tensor must be in one rank's pieces exactly, or LogicError is thrown on all ranks. One run at a
/// time may write into a folder.
///
/// begin() returns when the pieces' values are copied into a bounded ring in memory; where that is smaller
/// than what the rank saves, it waits for the disk to make room. A thread takes checksums of what stands
/// there, writes and syncs. Two things then need all ranks and are done in advance(), whose caller tells when
/// all are ready: rank 0 learns of everyone's file, and all learn of its publishing, which a thread of rank 0
/// does.
///
/// A checkpoint appears under its name only when every byte of it is on the disk, so a crash at any moment
/// leaves the older checkpoints as they were and at most a ".tmp-" folder, which the next save removes. Where
/// any rank's file operation fails, nothing is left behind, and all ranks receive the reason: training may go
/// on. A checkpoint of the same number of updates is replaced by "step-<updates>-<n>" (n = 2, 3, ...), which
/// readers prefer.
///
/// Then checkpoints that SaveOptions does not keep are removed. Those of more updates, left by a run that
/// went back, are renamed to "set-aside-step-...", which nothing reads or removes. Failures of this clean-up
/// are logged and do not fail the save.
class CheckpointWriter {
 public:
  /// `files` must outlive the writer.
  CheckpointWriter(Group world, FileSystem& files, std::filesystem::path folder, const SaveOptions& options);

  /// Gives up a save that is on its way, once the operation that is being done returns; what it has written
  /// stays as after a crash.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Begins a save; returns what became of it where that is known already: it cannot be written. `info` is
  /// rank 0's. LogicError while a save is on its way. Collective over the world.
  std::optional<SaveResult> begin(const CheckpointInfo& info, std::span<const TensorPiece> mine);

  bool in_flight() const;

  /// How far this rank is, over all of its saves; never falls.
  int64_t progress();

  /// Does what all ranks are ready for, `progress_of_all` being the least of their progress() at some time
  /// since, the same on every rank; the result of a save that has come to its end. Does not wait for disks.
  /// Collective over the world.
  std::optional<SaveResult> advance(int64_t progress_of_all);

  /// Waits for the end of the save on its way. Collective over the world.
  SaveResult finish();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes one checkpoint and waits for its end. Collective over `world`.
SaveResult save_checkpoint(const Group& world, FileSystem& files, const std::filesystem::path& folder,
                           const CheckpointInfo& info, std::span<const TensorPiece> mine,
                           const SaveOptions& options);

/// A checkpoint open for reading under any layout. A cheap value; reads are not collective.
class CheckpointReader {
 public:
  /// Reads and checks the manifest in the checkpoint's folder ("step-..."), and that its data files are there
  /// in their full lengths. Throws DamagedCheckpoint; DataError where a newer version of this program is
  /// needed; IoError. `files` must outlive the reader.
  CheckpointReader(FileSystem& files, const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const CheckpointInfo& info() const;

  /// Every logical tensor, by name, then role.
  const std::vector<StoredTensorInfo>& tensors() const;

  /// Fills each piece's data. Blocks of the files that hold wanted elements are read whole and verified
  /// before anything of them is used, through one fixed buffer. Throws DataError where the checkpoint has no
  /// such tensor or has it with another shape or type, DamagedCheckpoint naming file and tensor, and IoError;
  /// the pieces' contents are undefined then.
  void read(std::span<const TensorPiece> wanted) const;

  /// Reads and verifies every byte; one sentence for each thing that is damaged, none for a good checkpoint.
  std::vector<std::string> find_damage() const;

 private:
  struct Contents;
  friend std::optional<CheckpointReader> open_newest_checkpoint(
      const Group&, FileSystem&, const std::filesystem::path&,
      const std::function<void(const CheckpointReader&)>&, bool);

  CheckpointReader(FileSystem& files, const std::filesystem::path& folder, std::string_view manifest);
  void check_files() const;

  FileSystem* files_;
  std::filesystem::path folder_;
  std::shared_ptr<const Contents> contents_;
};

/// The names of the checkpoints in a run's folder, newest first; none where the folder is absent.
std::vector<std::string> list_checkpoints(FileSystem& files, const std::filesystem::path& folder);

/// Opens the newest good checkpoint of those that save_checkpoint wrote into `folder` and calls `use` with
/// it, which checks the info and reads what its rank needs; it must not communicate. Where the checkpoint is
/// damaged for any rank (DamagedCheckpoint or IoError), that is logged and all ranks go on with the next
/// older one, or where not `older_too` ends with that reason as a DataError. Any other Error of `use` on any
/// rank becomes one of the same text and exit code on every rank. None where there is no checkpoint at all;
/// DataError, never none, where there are and all are damaged. Collective over `world`.
std::optional<CheckpointReader> open_newest_checkpoint(
    const Group& world, FileSystem& files, const std::filesystem::path& folder,
    const std::function<void(const CheckpointReader&)>& use, bool older_too = true);

}  // namespace normformer
