// A run's configuration: TOML, then overrides, each after a zero byte.
#include "normformer/config/run_config.h"

#include "fuzz.h"

using namespace normformer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzInput input(data, size);
  const std::string text(input.until('\0'));
  std::vector<std::string> overrides;
  while (!input.rest().empty()) overrides.emplace_back(input.until('\0'));
  RunConfig config;
  if (!takes([&] { config = parse_run_config(text, "it", overrides); })) return 0;
  require(parse_run_config(to_toml(config), "it", {}) == config, "a configuration comes back as it was");
  for (const int64_t world : {1, 6, 8}) {
    takes([&] { static_cast<void>(resolve_layout(config, world)); });
    takes([&] { static_cast<void>(nearest_layout(config, world)); });
  }
  return 0;
}
