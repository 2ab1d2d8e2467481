#include "normformer/training/agreement.h"

#include <algorithm>
#include <vector>

#include <fmt/ranges.h>

namespace normformer {

void run_agreed(const Group& world, const std::function<void()>& body) {
  std::string mine;
  try {
    body();
  } catch (const Error& e) {
    mine = fmt::format("{} {}", static_cast<int>(e.exit_code()), e.what());
  }
  int code = 0;
  std::vector<std::string> messages;
  for (const std::string& text : world.all_gather_text(mine)) {
    if (text.empty()) continue;
    const size_t space = text.find(' ');
    if (code == 0) code = std::stoi(text.substr(0, space));
    const std::string message = text.substr(space + 1);
    if (std::find(messages.begin(), messages.end(), message) == messages.end()) messages.push_back(message);
  }
  if (code != 0) throw AgreedError(static_cast<ExitCode>(code), fmt::format("{}", fmt::join(messages, "\n")));
}

}  // namespace normformer
