#pragma once

#include <cstdint>
#include <string>
#include <string_view>

// What Python's str does, which prompts of lm-evaluation-harness are made with. Texts are valid UTF-8.
namespace normformer {

/// Without the white space at both ends, or at the end: str.strip() and str.rstrip().
std::string_view strip(std::string_view text);
std::string_view strip_end(std::string_view text);

/// str.replace(): all of `from` (not empty) in one pass from the left.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

/// re.sub(r"\[.*?\]", "", text): what stands in brackets within one line goes, and the brackets.
std::string without_brackets(std::string_view text);

/// len(): code points.
int64_t length_in_characters(std::string_view text);

/// text[:-1]
std::string_view without_last_character(std::string_view text);

/// text[0].lower() + text[1:]; the text is not empty.
std::string with_small_first(std::string_view text);

}  // namespace normformer
