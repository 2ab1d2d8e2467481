#include "normformer/evaluation/task.h"

#include <algorithm>
#include <array>
#include <utility>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"
#include "normformer/data/unicode.h"

#include "csv.h"
#include "data/json_file.h"
#include "record.h"
#include "task_items.h"

namespace normformer {

namespace {

constexpr std::array<TaskRule, 11> kTasks{{
    {.name = "hellaswag", .is_normalised = true},
    {.name = "piqa", .is_normalised = true},
    {.name = "winogrande"},
    {.name = "openbookqa", .is_normalised = true},
    {.name = "arc_easy", .is_normalised = true},
    {.name = "arc_challenge", .is_normalised = true},
    {.name = "storycloze_2016"},
    {.name = "storycloze_2018"},
    {.name = "copa"},
    {.name = "lambada_openai", .kind = TaskKind::last_word},
    {.name = "lambada_standard", .kind = TaskKind::last_word},
}};

const TaskRule* find_rule(std::string_view name) {
  const auto found =
      std::find_if(kTasks.begin(), kTasks.end(), [&](const TaskRule& rule) { return rule.name == name; });
  return found == kTasks.end() ? nullptr : &*found;
}

std::string names_of_tasks() {
  std::string names;
  for (const TaskRule& rule : kTasks) names += fmt::format("{}{}", names.empty() ? "" : ", ", rule.name);
  return names;
}

std::string place_of(const std::filesystem::path& file, int64_t line) {
  return fmt::format("{} line {}", file.string(), line);
}

// Calls body(line, number) for lines that are not empty, from 1 on, until it returns false.
template <class Body>
void for_lines(std::string_view text, Body body) {
  for (int64_t number = 1; !text.empty(); ++number) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.find_first_not_of(" \t\r") != std::string_view::npos && !body(line, number)) return;
  }
}

void check_utf8(std::string_view text, const std::filesystem::path& file) {
  if (const auto invalid = find_invalid_utf8(text))
    throw DataError(fmt::format("{} is not UTF-8 at byte {}", file.string(), *invalid));
}

std::vector<Record> read_json_lines(const TaskSource& source, std::size_t limit) {
  const MappedFile file(source.file);
  std::vector<Record> records;
  for_lines(file.text(), [&](std::string_view line, int64_t number) {
    if (records.size() == limit) return false;
    const std::string place = place_of(source.file, number);
    records.emplace_back(parse_json(line, place), place);
    return true;
  });
  return records;
}

std::vector<Record> read_table(const TaskSource& source, std::size_t limit) {
  const MappedFile file(source.file);
  std::string_view text = file.text();
  check_utf8(text, source.file);
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  const std::vector<CsvRow> rows = read_csv(text, source.file.string());
  std::vector<Record> records;
  for (std::size_t i = 1; i < rows.size() && records.size() < limit; ++i) {
    const std::string place = place_of(source.file, rows[i].line);
    const std::vector<std::string>& names = rows.front().fields;
    if (rows[i].fields.size() != names.size()) {
      throw DataError(fmt::format("{} has {} fields, and the first line names {}", place,
                                  rows[i].fields.size(), names.size()));
    }
    nlohmann::json object;
    for (std::size_t f = 0; f < names.size(); ++f) object[names[f]] = rows[i].fields[f];
    records.emplace_back(std::move(object), place);
  }
  return records;
}

// What the lines of a file of labels say, put into the records.
void add_labels(const TaskSource& source, bool is_all, std::vector<Record>& records) {
  const MappedFile file(source.labels);
  check_utf8(file.text(), source.labels);
  std::vector<std::string> labels;
  for_lines(file.text(), [&](std::string_view line, int64_t) {
    labels.emplace_back(line.substr(0, line.find_last_not_of(" \t\r") + 1));
    return true;
  });
  if (labels.size() < records.size() || (is_all && labels.size() > records.size())) {
    throw DataError(fmt::format("{} has {} labels for the {} items of {}", source.labels.string(),
                                labels.size(), records.size(), source.file.string()));
  }
  for (std::size_t i = 0; i < records.size(); ++i) records[i].set("label", labels[i]);
}

}  // namespace

std::span<const TaskRule> known_tasks() { return kTasks; }

TaskSource parse_task_source(std::string_view text) {
  const std::size_t equals = text.find('=');
  TaskSource source{.name = std::string(text.substr(0, equals)), .file = {}, .labels = {}};
  if (find_rule(source.name) == nullptr) {
    throw ConfigError(
        fmt::format("--task {}: no task is named \"{}\"; there are {}", text, source.name, names_of_tasks()));
  }
  std::string_view files = equals == std::string_view::npos ? "" : text.substr(equals + 1);
  const std::size_t comma = source.name == "piqa" ? files.rfind(',') : std::string_view::npos;
  if (comma != std::string_view::npos) {
    source.labels = files.substr(comma + 1);
    files = files.substr(0, comma);
  }
  source.file = files;
  if (source.file.empty()) {
    throw ConfigError(
        fmt::format("--task {}: write {}=FILE{}", text, source.name, source.name == "piqa" ? ",LABELS" : ""));
  }
  return source;
}

Task read_task(const TaskSource& source, std::optional<int64_t> limit) {
  const TaskRule* const rule = find_rule(source.name);
  NF_CHECK(rule != nullptr, "no task {}", source.name);
  const auto most = limit ? static_cast<std::size_t>(*limit) : SIZE_MAX;
  const bool is_table = source.name.starts_with("storycloze");
  std::vector<Record> records = is_table ? read_table(source, most) : read_json_lines(source, most);
  if (records.empty()) throw DataError(fmt::format("{} has no items", source.file.string()));
  if (!source.labels.empty()) add_labels(source, !limit, records);
  Task task{.rule = *rule, .items = {}};
  const ItemMaker make = item_maker(source.name);
  for (const Record& record : records) {
    task.items.push_back(make(record));
    if (!rule->is_normalised) task.items.back().lengths.clear();
  }
  return task;
}

}  // namespace normformer
