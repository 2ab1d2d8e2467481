#include "normformer/data/labelled_texts.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"
#include "normformer/data/unicode.h"

#include "json_file.h"
#include "output_file.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

std::string place_of(const fs::path& path, int64_t line) {
  return fmt::format("{} line {}", path.string(), line);
}

// The lines of a file, without what ends them.
class Lines {
 public:
  explicit Lines(const fs::path& path) : file_(path), rest_(file_.text()) {
    file_.expect_sequential_reading();
    if (rest_.starts_with(kByteOrderMark)) rest_.remove_prefix(kByteOrderMark.size());
  }

  /// The next line, or nothing at the end. Throws DataError where it is not UTF-8.
  std::optional<std::string_view> next() {
    if (rest_.empty()) return std::nullopt;
    const std::size_t end = std::min(rest_.find('\n'), rest_.size());
    std::string_view line = rest_.substr(0, end);
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    ++number_;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (find_invalid_utf8(line)) throw DataError(fmt::format("{} is not UTF-8", place()));
    return line;
  }

  int64_t number() const { return number_; }
  std::string place() const { return place_of(file_.path(), number_); }

 private:
  MappedFile file_;
  std::string_view rest_;
  int64_t number_ = 0;
};

bool is_blank(std::string_view text) { return text.find_first_not_of(" \t") == std::string_view::npos; }

void require_content(const Lines& lines, const std::string& field, std::string_view content) {
  if (!is_blank(content)) return;
  throw DataError(
      fmt::format("{} has nothing as \"{}\": fill it in, or leave the line out", lines.place(), field));
}

std::vector<std::string_view> columns_of(std::string_view line) {
  std::vector<std::string_view> columns;
  while (true) {
    const std::size_t tab = line.find('\t');
    columns.push_back(line.substr(0, tab));
    if (tab == std::string_view::npos) return columns;
    line.remove_prefix(tab + 1);
  }
}

// Where a file's columns have the fields.
class Columns {
 public:
  Columns(const Lines& lines, std::string_view header, const LabelledFields& fields)
      : fields_(fields), names_(columns_of(header)) {
    for (const std::string& name : fields.texts) texts_.push_back(find(lines, name, "data.text_fields"));
    if (!fields.label.empty()) label_ = find(lines, fields.label, "data.label_field");
  }

  LabelledText read(const Lines& lines, std::string_view line) const {
    const std::vector<std::string_view> columns = columns_of(line);
    if (columns.size() != names_.size()) {
      throw DataError(
          fmt::format("{} has {} columns, but the first line names {}: mend the line or leave it out",
                      lines.place(), columns.size(), names_.size()));
    }
    LabelledText made{.texts = {}, .label = {}, .line = lines.number()};
    for (std::size_t i = 0; i < texts_.size(); ++i) {
      require_content(lines, fields_.texts[i], columns[texts_[i]]);
      made.texts.emplace_back(columns[texts_[i]]);
    }
    if (fields_.label.empty()) return made;
    require_content(lines, fields_.label, columns[label_]);
    made.label = columns[label_];
    return made;
  }

 private:
  std::size_t find(const Lines& lines, const std::string& name, const char* key) const {
    const auto found = std::find(names_.begin(), names_.end(), name);
    if (found != names_.end()) return static_cast<std::size_t>(found - names_.begin());
    throw DataError(fmt::format("{} names no column \"{}\" (it names {}): write another {}", lines.place(),
                                name, fmt::join(names_, ", "), key));
  }

  const LabelledFields& fields_;
  std::vector<std::string_view> names_;
  std::vector<std::size_t> texts_;
  std::size_t label_ = 0;
};

std::vector<LabelledText> read_tsv(Lines& lines, const LabelledFields& fields) {
  std::vector<LabelledText> texts;
  const auto header = lines.next();
  if (!header) return texts;
  const Columns columns(lines, *header, fields);
  while (const auto line = lines.next()) {
    if (!line->empty()) texts.push_back(columns.read(lines, *line));
  }
  return texts;
}

const nlohmann::json& field_of(const Lines& lines, const nlohmann::json& object, const std::string& name,
                               const char* key) {
  const auto found = object.find(name);
  if (found != object.end()) return *found;
  throw DataError(fmt::format("{} has no \"{}\": add it, or write another {}", lines.place(), name, key));
}

std::string text_in(const Lines& lines, const nlohmann::json& object, const std::string& name) {
  const nlohmann::json& value = field_of(lines, object, name, "data.text_fields");
  if (!value.is_string()) throw DataError(fmt::format("{}: \"{}\" is not a string", lines.place(), name));
  require_content(lines, name, value.get_ref<const std::string&>());
  return value.get<std::string>();
}

std::string label_in(const Lines& lines, const nlohmann::json& object, const std::string& name) {
  const nlohmann::json& value = field_of(lines, object, name, "data.label_field");
  if (value.is_number_integer()) return value.dump();
  if (!value.is_string()) {
    throw DataError(
        fmt::format("{}: the label \"{}\" is neither a string nor an integer", lines.place(), name));
  }
  require_content(lines, name, value.get_ref<const std::string&>());
  return value.get<std::string>();
}

std::vector<LabelledText> read_jsonl(Lines& lines, const LabelledFields& fields) {
  std::vector<LabelledText> texts;
  while (const auto line = lines.next()) {
    if (is_blank(*line)) continue;
    const nlohmann::json object = parse_json(*line, lines.place());
    if (!object.is_object()) throw DataError(fmt::format("{} is not a JSON object", lines.place()));
    LabelledText made{.texts = {}, .label = {}, .line = lines.number()};
    for (const std::string& name : fields.texts) made.texts.push_back(text_in(lines, object, name));
    if (!fields.label.empty()) made.label = label_in(lines, object, fields.label);
    texts.push_back(std::move(made));
  }
  return texts;
}

// The integer that a text is, written as integers are.
std::optional<int64_t> integer_of(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || std::to_string(value) != text)
    return std::nullopt;
  return value;
}

std::vector<std::string> in_order(const std::set<std::string>& labels) {
  std::vector<std::string> names(labels.begin(), labels.end());
  if (!std::all_of(names.begin(), names.end(), integer_of)) return names;
  std::sort(names.begin(), names.end(),
            [](const std::string& a, const std::string& b) { return *integer_of(a) < *integer_of(b); });
  return names;
}

bool is_number_below(const std::string& label, int64_t limit) {
  const auto number = integer_of(label);
  return number && *number >= 0 && *number < limit;
}

}  // namespace

std::vector<LabelledText> read_labelled_texts(const fs::path& path, const LabelledFields& fields) {
  NF_CHECK(!fields.texts.empty() && fields.texts.size() <= 2, "{} texts", fields.texts.size());
  const std::string kind = path.extension().string();
  const bool is_json = kind == ".jsonl" || kind == ".ndjson" || kind == ".json";
  if (!is_json && kind != ".tsv") {
    throw ConfigError(fmt::format("{} is no file of labelled texts: name a .tsv or a .jsonl", path.string()));
  }
  Lines lines(path);
  std::vector<LabelledText> texts = is_json ? read_jsonl(lines, fields) : read_tsv(lines, fields);
  if (texts.empty()) throw DataError(fmt::format("{} has no texts", path.string()));
  return texts;
}

std::vector<std::string> class_names_of(const std::vector<LabelledText>& texts, int64_t classes,
                                        const fs::path& path) {
  std::set<std::string> labels;
  for (const LabelledText& text : texts) labels.insert(text.label);
  const bool all_numbers = std::all_of(labels.begin(), labels.end(), [&](const std::string& label) {
    return is_number_below(label, classes);
  });
  if (classes > 0 && all_numbers) {
    std::vector<std::string> names;
    for (int64_t number = 0; number < classes; ++number) names.push_back(std::to_string(number));
    return names;
  }
  const std::vector<std::string> names = in_order(labels);
  if (names.size() < 2) {
    throw DataError(fmt::format("all labels of {} are \"{}\": there is nothing to tell apart", path.string(),
                                names.empty() ? "" : names.front()));
  }
  if (classes > 0 && static_cast<int64_t>(names.size()) != classes) {
    throw DataError(fmt::format("{} has {} different labels, but model.classes is {}: write that, or 0",
                                path.string(), names.size(), classes));
  }
  return names;
}

void write_class_names(const fs::path& path, const std::vector<std::string>& names) {
  const std::string text = nlohmann::json(names).dump(2) + "\n";
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

std::vector<std::string> read_class_names(const fs::path& path) {
  const nlohmann::json json = read_json_file(path, "the names of classes");
  const auto is_text = [](const nlohmann::json& name) { return name.is_string(); };
  if (!json.is_array() || json.empty() || !std::all_of(json.begin(), json.end(), is_text))
    throw DataError(fmt::format("the names of classes {} are not a list of strings", path.string()));
  return json.get<std::vector<std::string>>();
}

}  // namespace normformer
