#include "normformer/training/agreement.h"

#include <algorithm>
#include <sstream>
#include <utility>
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

namespace {

// The first line in which two texts differ, in each of them.
std::pair<std::string, std::string> first_difference(const std::string& a, const std::string& b) {
  std::istringstream of_a(a);
  std::istringstream of_b(b);
  std::string line_a;
  std::string line_b;
  do {
    if (!std::getline(of_a, line_a)) line_a = "nothing";
    if (!std::getline(of_b, line_b)) line_b = "nothing";
  } while (line_a == line_b && of_a && of_b);
  return {line_a, line_b};
}

}  // namespace

void require_same(const Group& world, const std::string& what, const std::string& value) {
  const bool root = world.rank() == 0;
  const std::string of_root = world.all_gather_text(root ? host_name() + "\n" + value : "").front();
  const size_t end_of_host = of_root.find('\n');
  std::string mine;
  if (const std::string expected = of_root.substr(end_of_host + 1); value != expected) {
    const auto [there, here] = first_difference(expected, value);
    mine = fmt::format("rank {} on {} has another {} than rank 0 on {}: '{}' and '{}'", world.rank(),
                       host_name(), what, of_root.substr(0, end_of_host), here, there);
  }
  for (const std::string& text : world.all_gather_text(mine)) {
    if (!text.empty()) throw AgreedError(ExitCode::bad_usage, text);
  }
}

}  // namespace normformer
