#include "agree.h"

#include <algorithm>
#include <exception>

#include <fmt/format.h>

namespace normformer {

std::string failure_of(const std::function<void()>& body) {
  try {
    body();
    return "";
  } catch (const std::exception& e) {
    return e.what();
  }
}

std::string first_failure(const std::vector<std::string>& failures) {
  const auto failed = [](const std::string& failure) { return !failure.empty(); };
  const auto first = std::find_if(failures.begin(), failures.end(), failed);
  if (first == failures.end()) return "";
  const auto others = std::count_if(first + 1, failures.end(), failed);
  return fmt::format("rank {}: {}{}", first - failures.begin(), *first,
                     others == 0 ? "" : fmt::format(" (and {} more ranks failed)", others));
}

std::string root_failure(const Group& world, const std::function<void()>& body) {
  return first_failure(world.all_gather_text(world.rank() == 0 ? failure_of(body) : ""));
}

}  // namespace normformer
