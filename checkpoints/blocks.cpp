#include "blocks.h"

#include <algorithm>
#include <utility>

namespace normformer {

namespace {

/// How many data files a reader keeps open: far below the usual limit of a process.
constexpr size_t kMaxOpenFiles = 64;

StoredPiece append_piece(WritableFile& file, const PieceOutline& outline, StagingRing& ring,
                         int64_t block_bytes) {
  StoredPiece stored;
  stored.place = outline.place;
  for (int64_t left = outline.bytes(); left > 0; left -= block_bytes) {
    const std::span<const std::byte> block = ring.oldest();
    if (block.empty()) throw IoError("the save was given up");
    stored.block_checksums.push_back(checksum_of(block));
    file.append(block);
    ring.release();
  }
  return stored;
}

StoredTensorInfo info_of(const TensorPiece& piece) {
  return {piece.name, piece.role, piece.data.dtype(), piece.rectangle.global_rows,
          piece.rectangle.global_columns};
}

}  // namespace

void check_piece(const TensorPiece& piece) {
  const Rectangle& r = piece.rectangle;
  const bool inside = r.rows.begin >= 0 && !r.rows.empty() && r.rows.end <= r.global_rows &&
                      r.columns.begin >= 0 && !r.columns.empty() && r.columns.end <= r.global_columns;
  NF_CHECK(inside && piece.range.begin >= 0 && piece.range.end <= r.numel(),
           "a piece of '{}' lies outside of the tensor or of its rectangle", piece.name);
  NF_CHECK(piece.data.defined() && piece.data.numel() == piece.range.size(),
           "a piece of '{}' of {} elements in {}", piece.name, piece.range.size(), to_string(piece.data));
}

std::vector<PieceOutline> outlines_of(std::span<const TensorPiece> pieces) {
  std::vector<PieceOutline> outlines;
  for (const TensorPiece& piece : pieces) {
    if (!piece.range.empty()) outlines.push_back({info_of(piece), {piece.rectangle, piece.range}});
  }
  return outlines;
}

void stage_pieces(StagingRing& ring, std::span<const TensorPiece> pieces, int64_t block_bytes) {
  for (const TensorPiece& piece : pieces) {
    const int64_t elements = piece.data.numel();
    const int64_t step = block_bytes / size_of(piece.data.dtype());
    for (int64_t at = 0; at < elements; at += step) {
      const Tensor block = piece.data.flat(at, std::min(step, elements - at));
      const std::span<std::byte> room = ring.reserve(block.nbytes());
      if (room.empty()) return;
      block.copy_out(room.data());
      ring.commit();
    }
  }
}

RankReport write_staged(FileSystem& files, const std::filesystem::path& path,
                        std::span<const PieceOutline> outlines, StagingRing& ring, int64_t block_bytes) {
  RankReport report;
  for (const PieceOutline& outline : outlines) report.file.bytes += outline.bytes();
  if (report.file.bytes == 0) return report;
  report.file.name = path.filename().string();
  const auto file = files.create(path);
  file->reserve(report.file.bytes);
  int64_t offset = 0;
  for (const PieceOutline& outline : outlines) {
    StoredPiece stored = append_piece(*file, outline, ring, block_bytes);
    stored.offset = offset;
    offset += outline.bytes();
    report.tensors.push_back({outline.info, {std::move(stored)}});
  }
  file->sync();
  file->close();
  return report;
}

std::unique_ptr<ReadableFile> open_data_file(FileSystem& files, const std::filesystem::path& folder,
                                             const DataFile& file) {
  const std::filesystem::path path = folder / file.name;
  if (!files.exists(path)) {
    throw DamagedCheckpoint(
        fmt::format("checkpoint {} is damaged: its file {} is missing", folder.string(), file.name));
  }
  auto opened = files.open(path);
  if (opened->size() != file.bytes) {
    throw DamagedCheckpoint(
        fmt::format("checkpoint {} is damaged: its file {} has {} bytes where {} were written",
                    folder.string(), file.name, opened->size(), file.bytes));
  }
  return opened;
}

BlockReader::BlockReader(FileSystem& files, const std::filesystem::path& folder, const Manifest& manifest)
    : files_(files), folder_(folder), manifest_(manifest) {}

std::span<const std::byte> BlockReader::read(const StoredTensor& tensor, const StoredPiece& piece,
                                             Range bytes) {
  const int64_t block = bytes.begin / manifest_.block_bytes;
  if (loaded_piece_ != &piece || loaded_block_ != block) load(tensor, piece, block);
  return std::span<const std::byte>(buffer_).subspan(
      static_cast<size_t>(bytes.begin - block * manifest_.block_bytes), static_cast<size_t>(bytes.size()));
}

const ReadableFile& BlockReader::open(int64_t file) {
  const auto found = open_files_.find(file);
  if (found != open_files_.end()) return *found->second;
  if (open_files_.size() >= kMaxOpenFiles) open_files_.clear();
  auto opened = open_data_file(files_, folder_, manifest_.files[static_cast<size_t>(file)]);
  return *open_files_.emplace(file, std::move(opened)).first->second;
}

void BlockReader::load(const StoredTensor& tensor, const StoredPiece& piece, int64_t block) {
  loaded_piece_ = nullptr;
  const int64_t piece_bytes = piece.place.range.size() * size_of(tensor.info.dtype);
  const int64_t begin = block * manifest_.block_bytes;
  const int64_t end = std::min(piece_bytes, begin + manifest_.block_bytes);
  buffer_.resize(static_cast<size_t>(end - begin));
  open(piece.file).read(piece.offset + begin, buffer_);
  const uint64_t found = checksum_of(buffer_);
  const uint64_t written = piece.block_checksums[static_cast<size_t>(block)];
  if (found != written) {
    throw DamagedCheckpoint(fmt::format(
        "checkpoint {} is damaged: bytes {} to {} of {}, in tensor '{}' ({}), have checksum {:016x} where "
        "{:016x} was written",
        folder_.string(), piece.offset + begin, piece.offset + end,
        manifest_.files[static_cast<size_t>(piece.file)].name, tensor.info.name, name_of(tensor.info.role),
        found, written));
  }
  loaded_piece_ = &piece;
  loaded_block_ = block;
}

}  // namespace normformer
