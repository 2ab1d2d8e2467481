#pragma once

#include <cctype>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/pipeline/schedule.h"
#include "normformer/pipeline/simulator.h"

namespace normformer {

/// A list as the papers draw it: "F0 F1 B0 I1 W1" with B backward, I backward_input, W backward_weight; a
/// letter after the number is the chunk: "F0a F0b".
inline std::vector<Action> actions(std::string_view text) {
  std::vector<Action> list;
  size_t i = 0;
  while (i < text.size()) {
    if (text[i] == ' ') {
      ++i;
      continue;
    }
    const size_t kind = std::string_view("FBIW").find(text[i++]);
    if (kind == std::string_view::npos) throw std::invalid_argument(std::string(text));
    Action action{static_cast<ActionKind>(kind), 0, 0};
    while (i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])))
      action.micro_batch = 10 * action.micro_batch + (text[i++] - '0');
    if (i < text.size() && text[i] >= 'a') action.chunk = text[i++] - 'a';
    list.push_back(action);
  }
  return list;
}

/// A schedule from one such text a stage.
inline Schedule lists(int64_t micro_batches, const std::vector<std::string>& stages, int64_t chunks = 1,
                      Placement placement = Placement::round_robin) {
  Schedule schedule{micro_batches, chunks, {}, placement};
  for (const std::string& text : stages) schedule.stages.push_back(actions(text));
  return schedule;
}

/// Two stages of ZB-H1 (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.1): weight
/// gradients fill what was idle, and every stage keeps two micro-batches alive.
inline Schedule zero_bubble_two_stages() {
  return lists(4, {"F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3", "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3"});
}

/// Two ranks with two chunks each (interleaved 1F1B, Narayanan et al. 2021, section 2.2).
inline Schedule interleaved_two_stages() {
  return lists(2,
               {"F0a F1a F0b F1b B0b B1b B0a B1a",  //
                "F0a F1a F0b B0b F1b B1b B0a B1a"},
               2);
}

/// Two ranks with two chunks each in a V (ZB-V, Qi et al. 2024, section 6).
inline Schedule zb_v_two_stages() {
  return lists(3,
               {"F0a F1a F2a F0b I0b W0b F1b I1b W1b I0a W0a F2b I2b W2b I1a W1a I2a W2a",
                "F0a F0b F1a F1b I0b W0b F2a I0a W0a F2b I1b W1b I1a I2b I2a W1a W2b W2a"},
               2, Placement::v_shape);
}

/// The same times for all parts.
inline StageTimes equal_times(int64_t parts, double forward, double input, double weight,
                              double transfer = 0) {
  const auto n = static_cast<size_t>(parts);
  return {std::vector<double>(n, forward), std::vector<double>(n, input), std::vector<double>(n, weight),
          transfer};
}

}  // namespace normformer
