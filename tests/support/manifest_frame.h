#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "normformer/core/file_system.h"

#include "manifest.h"

namespace normformer {

/// The bytes of a number as this machine has them.
template <class T>
std::string raw_bytes(T number) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &number, sizeof(T));
  return bytes;
}

/// A MANIFEST around any payload, as checkpoints/FORMAT.md describes it.
inline std::string framed(const std::string& payload, uint32_t version = 1) {
  std::string bytes =
      "NFCKPT01" + raw_bytes(version) + raw_bytes(uint32_t{0}) + raw_bytes(uint64_t{payload.size()});
  bytes += raw_bytes(checksum_of(as_bytes(bytes)));
  return bytes + payload + raw_bytes(checksum_of(as_bytes(payload))) + "10TPKCFN";
}

/// The payload in a MANIFEST that write_manifest has written.
inline std::string payload_in(const std::string& manifest) {
  return manifest.substr(32, manifest.size() - 48);
}

}  // namespace normformer
