#pragma once

#include <string>
#include <vector>

namespace normformer {

/// The keys that overrides of a configuration set (load_run_config), as "section.key", sorted, each once.
/// Throws as load_run_config does where one cannot be read.
std::vector<std::string> overridden_keys(const std::vector<std::string>& overrides);

}  // namespace normformer
