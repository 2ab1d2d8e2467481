#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/checkpoints/safetensors.h"

namespace normformer {

/// The largest header that is accepted, as in the safetensors library.
inline constexpr int64_t kMaxSafetensorsHeader = 100'000'000;

/// What a header says: tensors in the order of their bytes.
struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;
};

/// Reads the JSON text of a header and checks it against a buffer of `data_bytes` bytes. Throws DataError
/// that begins with `file`.
SafetensorsHeader parse_safetensors_header(std::string_view json, int64_t data_bytes,
                                           const std::string& file);

/// The first bytes of a file: the header's length, and the header padded to a multiple of 8 bytes. Tensors
/// stand in the given order.
std::string make_safetensors_header(const std::vector<SafetensorsPlan>& tensors,
                                    const std::map<std::string, std::string>& metadata);

}  // namespace normformer
