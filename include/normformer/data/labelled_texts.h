#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace normformer {

/// A text, or a pair of texts, and the class that it belongs to.
struct LabelledText {
  std::vector<std::string> texts;  ///< one, or two of a pair
  std::string label;               ///< empty where none was read
  int64_t line = 0;                ///< of its file, from 1
};

/// Where a file has its texts and labels: names of columns, or of JSON objects' keys.
struct LabelledFields {
  std::vector<std::string> texts;  ///< one or two
  std::string label;               ///< empty: labels are not read
};

/// Reads a file of labelled texts: .tsv, whose first line names its columns and in which a tab always ends a
/// column (there are no quotes), or .jsonl (.ndjson, .json), one object a line, whose texts are strings and
/// whose labels are strings or integers. Throws DataError that names file and line where a line is not as the
/// others, is not UTF-8, or has an empty text or label, and where the file has no such column or no text at
/// all; ConfigError for another kind of file; IoError.
std::vector<LabelledText> read_labelled_texts(const std::filesystem::path& path,
                                              const LabelledFields& fields);

/// The classes that labels name, in the order of their numbers: 0 to classes - 1 where all labels are such
/// numbers, else the different labels, as numbers where all are integers and as bytes otherwise. `classes` =
/// 0 means as many as there are labels. Throws DataError, which names `path`, where there are not two labels,
/// or not as many as `classes`.
std::vector<std::string> class_names_of(const std::vector<LabelledText>& texts, int64_t classes,
                                        const std::filesystem::path& path);

/// Writes names of classes as JSON, a list of strings; and reads them. Throw IoError, DataError.
void write_class_names(const std::filesystem::path& path, const std::vector<std::string>& names);
std::vector<std::string> read_class_names(const std::filesystem::path& path);

}  // namespace normformer
