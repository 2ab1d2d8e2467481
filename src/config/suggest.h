#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace normformer {

/// The number of single-character insertions, deletions, replacements and swaps of neighbours that turn one
/// word into the other (optimal string alignment distance).
int edit_distance(std::string_view a, std::string_view b);

/// The word of `known` that `word` most likely stands for; "" where none is near. The first of equally near
/// ones wins.
std::string nearest(std::string_view word, const std::vector<std::string>& known);

/// "a, b, c".
std::string join(const std::vector<std::string>& words);

}  // namespace normformer
