#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"

#include "layout.h"

namespace normformer {

/// The version of the format that this program writes and the newest that it reads.
inline constexpr uint32_t kFormatVersion = 1;

/// The largest MANIFEST that is accepted.
inline constexpr int64_t kMaxManifestBytes = int64_t{64} << 20;

/// Whether a format may have blocks of this size.
constexpr bool is_block_size(int64_t bytes) {
  return bytes > 0 && bytes <= int64_t{64} << 20 && bytes % 8 == 0;
}

inline constexpr const char* kManifestName = "MANIFEST";

/// XXH3-64 of some bytes, with seed 0.
uint64_t checksum_of(std::span<const std::byte> bytes);

/// A piece of a logical tensor in a data file.
struct StoredPiece {
  int64_t file = 0;    ///< index among the manifest's files
  int64_t offset = 0;  ///< first byte in it
  PiecePlace place;
  std::vector<uint64_t> block_checksums;  ///< of each block_bytes bytes of the piece; the last may be shorter
};

/// A logical tensor and the pieces that hold each of its elements once.
struct StoredTensor {
  StoredTensorInfo info;
  std::vector<StoredPiece> pieces;
};

struct DataFile {
  std::string name;
  int64_t bytes = 0;
};

/// Everything that MANIFEST says.
struct Manifest {
  CheckpointInfo info;
  int64_t block_bytes = 0;
  std::vector<DataFile> files;
  std::vector<StoredTensor> tensors;  ///< by name, then role
};

/// The bytes of the file MANIFEST; the same manifest gives the same bytes.
std::string write_manifest(const Manifest& manifest);

/// Reads and checks the bytes of a MANIFEST: its frame, its limits, names, sizes and places, that pieces lie
/// one after another in their files, and that they cover each tensor exactly. `where` begins the messages.
/// Throws DamagedCheckpoint, or DataError where a newer version of this program is needed.
Manifest read_manifest(std::string_view bytes, const std::string& where);

/// The bytes of the MANIFEST in a checkpoint's folder. Throws DamagedCheckpoint where there is none or it is
/// too large, and IoError.
std::string read_manifest_file(FileSystem& files, const std::filesystem::path& folder);

/// What a rank tells the others after writing its data file.
struct RankReport {
  std::string failure;  ///< "" where it wrote everything
  DataFile file;        ///< without a name where it had nothing to write
  std::vector<StoredTensor> tensors;
  double copy_seconds = 0.0;   ///< for which it stood still to copy
  double write_seconds = 0.0;  ///< from the first byte to the end of the sync
};

std::string write_report(const RankReport& report);
RankReport read_report(const std::string& bytes);

}  // namespace normformer
