// MANIFEST of a checkpoint: the input as it is, and as the payload of a frame with right checksums.
#include "fuzz.h"
#include "manifest.h"
#include "quiet_protobuf.h"
#include "support/manifest_frame.h"

using namespace normformer;

namespace {

void read_twice(const std::string& bytes) {
  Manifest first;
  if (!takes([&] { first = read_manifest(bytes, "it"); })) return;
  const std::string written = write_manifest(first);
  require(write_manifest(read_manifest(written, "it")) == written,
          "a manifest that was read is written alike");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  read_twice(bytes);
  read_twice(framed(bytes));
  return 0;
}
