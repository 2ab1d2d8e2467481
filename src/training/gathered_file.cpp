#include "normformer/training/gathered_file.h"

#include <optional>

#include "normformer/checkpoints/safetensors.h"

namespace normformer {

void write_gathered(Context& context, const Group& world, std::span<const ParameterPiece> mine, DType dtype,
                    const std::filesystem::path& path) {
  const auto files = make_system_files();
  std::optional<SafetensorsWriter> writer;
  std::vector<SafetensorsPlan> plan;
  for (const LogicalTensor& tensor : list_logical(world, mine))
    plan.push_back({tensor.name, dtype, tensor.shape});
  if (world.rank() == 0) writer.emplace(*files, path, std::move(plan));
  // One type: the file's order is by name, which is the order in which tensors come.
  gather_logical(context, world, mine, dtype, 0,
                 [&](const std::string& name, const Tensor& whole) { writer->write(name, whole); });
  if (writer) writer->finish();
}

}  // namespace normformer
