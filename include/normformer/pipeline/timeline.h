#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "normformer/pipeline/simulator.h"

namespace normformer {

/// A picture of what ranks did when, as one SVG file that needs no other: a row a rank, a box an action with
/// the micro-batch's number in it where there is room, coloured by kind and paler by chunk, a time axis that
/// begins with the first action, a legend, and the share of bubble behind the title. Boxes say what they are
/// under the pointer.
///
/// `rows` is [rank]: timed actions in the order of time, of a simulation or of a trace of a real run, in
/// `unit` (any text: "ms"). LogicError where an action ends before it begins, overlaps the one before it, is
/// of no known kind or chunk, or its times are not finite.
std::string draw_svg(const std::vector<std::vector<TimedAction>>& rows, std::string_view title,
                     std::string_view unit);

}  // namespace normformer
