// A checkpoint's folder: flags, the payload of its MANIFEST behind its length, and the bytes of its data
// files.
#include <cstring>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/tensor/context.h"

#include "faults/memory_files.h"
#include "fuzz.h"
#include "manifest.h"
#include "quiet_protobuf.h"
#include "support/manifest_frame.h"

using namespace normformer;

namespace {

namespace fs = std::filesystem;

constexpr int64_t kMostBytes = 64 << 10;  // of all data files together
const fs::path kFolder = "/step-0000000001";

/// A disk of which nothing but the files in one folder may be looked at.
class OneFolder : public MemoryFiles {
 public:
  std::unique_ptr<ReadableFile> open(const fs::path& path) override {
    check(path);
    return MemoryFiles::open(path);
  }
  bool exists(const fs::path& path) override {
    check(path);
    return MemoryFiles::exists(path);
  }

 private:
  static void check(const fs::path& path) {
    const bool inside = path.parent_path() == kFolder && path.has_filename() && path.filename() != "." &&
                        path.filename() != "..";
    require(inside, path.string());
  }
};

int64_t total_bytes(const Manifest& manifest) {
  int64_t bytes = 0;
  for (const DataFile& file : manifest.files) bytes += std::min(file.bytes, kMostBytes + 1);
  return bytes;
}

/// Right checksums for whatever the files hold.
void mend_checksums(Manifest& manifest, MemoryFiles& files) {
  for (StoredTensor& tensor : manifest.tensors) {
    for (StoredPiece& piece : tensor.pieces) {
      const std::string& content = files.content(kFolder / manifest.files.at(piece.file).name);
      const int64_t bytes = piece.place.range.size() * size_of(tensor.info.dtype);
      for (int64_t block = 0; block * manifest.block_bytes < bytes; ++block) {
        const int64_t begin = block * manifest.block_bytes;
        const std::string_view part = std::string_view(content).substr(
            piece.offset + begin, std::min(manifest.block_bytes, bytes - begin));
        piece.block_checksums.at(block) = checksum_of(as_bytes(part));
      }
    }
  }
}

TensorPiece piece_of(Context& context, const StoredTensorInfo& info, Range columns, Range elements) {
  const Rectangle rectangle{{0, info.rows}, columns, info.rows, info.columns};
  return {info.name, info.role, rectangle, elements, context.empty({elements.size()}, info.dtype)};
}

/// Every tensor as a whole, and its left columns and the middle of its elements, which must agree with it.
void read_everything(const CheckpointReader& reader) {
  Context context(DeviceKind::cpu);
  for (const StoredTensorInfo& info : reader.tensors()) {
    const int64_t size = size_of(info.dtype);
    const TensorPiece whole = piece_of(context, info, {0, info.columns}, {0, info.rows * info.columns});
    const TensorPiece left =
        piece_of(context, info, {0, (info.columns + 1) / 2}, {0, info.rows * ((info.columns + 1) / 2)});
    const int64_t third = whole.range.size() / 3;
    const TensorPiece middle =
        piece_of(context, info, {0, info.columns}, {third, whole.range.size() - third});
    reader.read(std::vector{whole, left, middle});
    const auto* all = static_cast<const std::byte*>(whole.data.raw());
    require(std::memcmp(all + third * size, middle.data.raw(), middle.range.size() * size) == 0,
            "a run of elements is that of the whole");
    const int64_t row_bytes = left.rectangle.columns.size() * size;
    for (int64_t row = 0; row < info.rows; ++row) {
      const auto* part = static_cast<const std::byte*>(left.data.raw()) + row * row_bytes;
      require(std::memcmp(all + row * info.columns * size, part, row_bytes) == 0,
              "the left columns are those of the whole");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzInput input(data, size);
  const uint8_t flags = input.byte();
  const bool cuts = (flags & 2) != 0;
  const bool mends = (flags & 1) != 0 && !cuts;
  std::string bytes = framed(std::string(input.part()));
  OneFolder files;
  files.make_folder(kFolder);

  Manifest manifest;
  const bool good = takes([&] { manifest = read_manifest(bytes, "it"); });
  if (good && total_bytes(manifest) <= kMostBytes) {
    for (const DataFile& file : manifest.files) {
      std::string content(input.bytes(file.bytes));
      if (!cuts) content.resize(file.bytes);
      files.create(kFolder / file.name)->append(as_bytes(content));
    }
    if (mends) {
      mend_checksums(manifest, files);
      bytes = write_manifest(manifest);
    }
  }
  files.create(kFolder / kManifestName)->append(as_bytes(bytes));

  const bool whole = takes([&] {
    const CheckpointReader reader(files, kFolder);
    const bool damaged = !reader.find_damage().empty();
    require(!(mends && damaged), "a checkpoint with right checksums is good");
    require(takes([&] { read_everything(reader); }) == !damaged, "what is not damaged can be read");
  });
  require(whole || !good || !mends || total_bytes(manifest) > kMostBytes,
          "a checkpoint with right checksums opens");
  return 0;
}
