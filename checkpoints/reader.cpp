#include <algorithm>
#include <cstring>
#include <utility>

#include "normformer/checkpoints/checkpoint.h"

#include "blocks.h"
#include "manifest.h"

namespace normformer {

namespace {

void copy_run(BlockReader& blocks, const StoredTensor& tensor, const StoredPiece& piece, int64_t block_bytes,
              Range from, std::byte* to) {
  while (!from.empty()) {
    const int64_t block_end = (from.begin / block_bytes + 1) * block_bytes;
    const Range part{from.begin, std::min(from.end, block_end)};
    const auto bytes = blocks.read(tensor, piece, part);
    std::memcpy(to, bytes.data(), bytes.size());
    to += bytes.size();
    from.begin = part.end;
  }
}

}  // namespace

std::string read_manifest_file(FileSystem& files, const std::filesystem::path& folder) {
  if (!files.exists(folder / kManifestName)) {
    throw DamagedCheckpoint(
        fmt::format("{} is not a checkpoint: it has no file {}", folder.string(), kManifestName));
  }
  try {
    return read_whole_file(files, folder / kManifestName, kMaxManifestBytes);
  } catch (const DataError& e) {
    throw DamagedCheckpoint(fmt::format("checkpoint {} is damaged: {}", folder.string(), e.what()));
  }
}

struct CheckpointReader::Contents {
  Manifest manifest;
  std::vector<StoredTensorInfo> infos;

  const StoredTensor* find(const std::string& name, Role role) const {
    const auto key = [](const StoredTensor& t) {
      return std::pair(std::string_view(t.info.name), t.info.role);
    };
    const std::pair wanted(std::string_view(name), role);
    const auto found = std::lower_bound(manifest.tensors.begin(), manifest.tensors.end(), wanted,
                                        [&](const StoredTensor& t, const auto& w) { return key(t) < w; });
    return found != manifest.tensors.end() && key(*found) == wanted ? &*found : nullptr;
  }

  /// The stored tensor that a piece is wanted of; DataError where there is none such.
  const StoredTensor& find_for(const TensorPiece& wanted, const std::filesystem::path& folder) const {
    const StoredTensor* tensor = find(wanted.name, wanted.role);
    if (tensor == nullptr) {
      throw DataError(
          fmt::format("checkpoint {} has no tensor '{}' ({}): it is of another model; resume it with its "
                      "own configuration, or choose another folder",
                      folder.string(), wanted.name, name_of(wanted.role)));
    }
    const StoredTensorInfo& info = tensor->info;
    const Rectangle& rectangle = wanted.rectangle;
    if (info.rows != rectangle.global_rows || info.columns != rectangle.global_columns) {
      throw DataError(
          fmt::format("checkpoint {} has tensor '{}' ({}) as {} x {} where this model has {} x {}; resume "
                      "it with its own configuration, or choose another folder",
                      folder.string(), wanted.name, name_of(wanted.role), info.rows, info.columns,
                      rectangle.global_rows, rectangle.global_columns));
    }
    if (info.dtype != wanted.data.dtype()) {
      throw DataError(
          fmt::format("checkpoint {} has tensor '{}' ({}) in {} where this run computes in {}; set "
                      "train.precision as it was, or convert it with `normformer checkpoint reshard`",
                      folder.string(), wanted.name, name_of(wanted.role), name_of(info.dtype),
                      name_of(wanted.data.dtype())));
    }
    return *tensor;
  }
};

CheckpointReader::CheckpointReader(FileSystem& files, const std::filesystem::path& folder)
    : CheckpointReader(files, folder, read_manifest_file(files, folder)) {
  check_files();
}

CheckpointReader::CheckpointReader(FileSystem& files, const std::filesystem::path& folder,
                                   std::string_view manifest)
    : files_(&files), folder_(folder) {
  auto contents = std::make_shared<Contents>();
  contents->manifest = read_manifest(manifest, (folder / kManifestName).string());
  for (const StoredTensor& tensor : contents->manifest.tensors) contents->infos.push_back(tensor.info);
  contents_ = std::move(contents);
}

void CheckpointReader::check_files() const {
  for (const DataFile& file : contents_->manifest.files) open_data_file(*files_, folder_, file);
}

const CheckpointInfo& CheckpointReader::info() const { return contents_->manifest.info; }

const std::vector<StoredTensorInfo>& CheckpointReader::tensors() const { return contents_->infos; }

void CheckpointReader::read(std::span<const TensorPiece> wanted) const {
  BlockReader blocks(*files_, folder_, contents_->manifest);
  const int64_t block_bytes = contents_->manifest.block_bytes;
  for (const TensorPiece& piece : wanted) {
    if (piece.range.empty()) continue;
    check_piece(piece);
    const StoredTensor& tensor = contents_->find_for(piece, folder_);
    const int64_t element = size_of(tensor.info.dtype);
    // What belongs on a GPU is put together on the host first.
    std::vector<std::byte> staging(
        piece.data.device() == DeviceKind::cuda ? static_cast<size_t>(piece.data.nbytes()) : 0);
    std::byte* to = staging.empty() ? static_cast<std::byte*>(piece.data.raw()) : staging.data();
    for (const StoredPiece& stored : tensor.pieces) {
      for_each_shared_run(stored.place, {piece.rectangle, piece.range},
                          [&](int64_t from, int64_t at, int64_t count) {
                            copy_run(blocks, tensor, stored, block_bytes,
                                     {from * element, (from + count) * element}, to + at * element);
                          });
    }
    if (!staging.empty()) piece.data.copy_in(staging.data());
  }
}

std::vector<std::string> CheckpointReader::find_damage() const {
  const Manifest& manifest = contents_->manifest;
  std::vector<std::string> damage;
  std::vector<bool> present(manifest.files.size());
  const auto note = [&](const std::function<void()>& check) {
    try {
      check();
      return true;
    } catch (const Error& e) {
      damage.push_back(e.what());
      return false;
    }
  };
  for (size_t i = 0; i < present.size(); ++i) {
    present[i] = note([&] { open_data_file(*files_, folder_, manifest.files[i]); });
  }
  BlockReader blocks(*files_, folder_, manifest);
  for (const StoredTensor& tensor : manifest.tensors) {
    for (const StoredPiece& piece : tensor.pieces) {
      if (!present[static_cast<size_t>(piece.file)]) continue;
      note([&] {
        for (size_t block = 0; block < piece.block_checksums.size(); ++block) {
          const int64_t begin = static_cast<int64_t>(block) * manifest.block_bytes;
          blocks.read(tensor, piece, {begin, begin});
        }
      });
    }
  }
  return damage;
}

}  // namespace normformer
