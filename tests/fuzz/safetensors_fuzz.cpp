// safetensors: the input as a file, and its first line as the header of one, with its right length in front.
#include <cstring>

#include "normformer/checkpoints/safetensors.h"
#include "normformer/tensor/context.h"

#include "faults/memory_files.h"
#include "fuzz.h"

using namespace normformer;

namespace {

/// Each tensor that can be read, whole, and its first row and first column converted.
void read_tensors(const SafetensorsReader& reader) {
  Context context(DeviceKind::cpu);
  for (const SafetensorsEntry& entry : reader.tensors()) {
    require(reader.contains(entry.name) && reader.tensor(entry.name).bytes == entry.bytes,
            "a tensor is found");
    if (!takes([&] { static_cast<void>(reader.read(context, entry.name)); })) continue;
    const int64_t rows = entry.shape.rank() == 0 ? 1 : entry.shape[0];
    if (rows == 0) {
      takes([&] { reader.read(entry.name, {{0, 0}, {0, 1}, 0, 1}, context.empty({0}, DType::f32)); });
      continue;
    }
    const int64_t columns = entry.shape.numel() / rows;
    for (const Rectangle& part : {Rectangle{{0, 1}, {0, columns}, rows, columns},
                                  Rectangle{{0, rows}, {0, std::min<int64_t>(columns, 1)}, rows, columns}}) {
      takes([&] { reader.read(entry.name, part, context.empty({part.numel()}, DType::f32)); });
    }
  }
}

void read_file(std::string_view content) {
  MemoryFiles files;
  files.create("/x")->append(as_bytes(content));
  takes([&] { read_tensors(SafetensorsReader(files, "/x")); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzInput input(data, size);
  read_file(input.rest());
  const std::string header(input.until('\n'));
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  read_file(file + header + std::string(input.rest()));
  return 0;
}
