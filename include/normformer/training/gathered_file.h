#pragma once

#include <filesystem>
#include <span>

#include "normformer/comm/group.h"
#include "normformer/sharding/parameter_piece.h"

namespace normformer {

/// Writes logical tensors, gathered from pieces of all ranks, as one safetensors file; rank 0 writes, with
/// memory for one tensor at a time. All pieces are of `dtype`, and so is the file. Throws IoError on rank 0.
/// Collective over the world.
void write_gathered(Context& context, const Group& world, std::span<const ParameterPiece> mine, DType dtype,
                    const std::filesystem::path& path);

}  // namespace normformer
