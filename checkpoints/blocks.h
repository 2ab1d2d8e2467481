#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "normformer/core/file_system.h"

#include "manifest.h"
#include "staging.h"

namespace normformer {

/// LogicError where a piece's parts do not agree with each other.
void check_piece(const TensorPiece& piece);

/// What is to be written of a piece, without its values.
struct PieceOutline {
  StoredTensorInfo info;
  PiecePlace place;
  int64_t bytes() const { return place.range.size() * size_of(info.dtype); }
};

/// Those of all pieces that have elements.
std::vector<PieceOutline> outlines_of(std::span<const TensorPiece> pieces);

/// Copies the pieces' values into the ring, block by block; ends early where the ring is stopped.
void stage_pieces(StagingRing& ring, std::span<const TensorPiece> pieces, int64_t block_bytes);

/// Writes what stage_pieces puts into the ring, one piece after another, into a new file at `path`, each
/// block with the checksum of the memory that it is written from, and returns once the file is on the disk.
/// The report's pieces have file 0. Writes nothing where there are no outlines. Throws IoError, also where
/// the ring is stopped.
RankReport write_staged(FileSystem& files, const std::filesystem::path& path,
                        std::span<const PieceOutline> outlines, StagingRing& ring, int64_t block_bytes);

/// Reads verified blocks of a checkpoint's data files, through one buffer. Not for several threads.
class BlockReader {
 public:
  BlockReader(FileSystem& files, const std::filesystem::path& folder, const Manifest& manifest);

  /// Bytes [begin, end) of a piece, which must lie within one of its blocks; valid until the next call.
  /// Throws DamagedCheckpoint naming file, tensor and place, and IoError.
  std::span<const std::byte> read(const StoredTensor& tensor, const StoredPiece& piece, Range bytes);

 private:
  const ReadableFile& open(int64_t file);
  void load(const StoredTensor& tensor, const StoredPiece& piece, int64_t block);

  FileSystem& files_;
  const std::filesystem::path& folder_;
  const Manifest& manifest_;
  std::map<int64_t, std::unique_ptr<ReadableFile>> open_files_;
  std::vector<std::byte> buffer_;
  const StoredPiece* loaded_piece_ = nullptr;
  int64_t loaded_block_ = -1;
};

/// Opens a data file and compares its length. Throws DamagedCheckpoint and IoError.
std::unique_ptr<ReadableFile> open_data_file(FileSystem& files, const std::filesystem::path& folder,
                                             const DataFile& file);

}  // namespace normformer
