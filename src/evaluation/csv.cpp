#include "csv.h"

#include <algorithm>

#include "normformer/core/error.h"

namespace normformer {

namespace {

class CsvReader {
 public:
  CsvReader(std::string_view text, std::string_view name) : text_(text), name_(name) {}

  std::vector<CsvRow> read() {
    std::vector<CsvRow> rows;
    while (at_ < text_.size()) {
      const int64_t line = line_;
      if (take_line_end()) continue;
      rows.push_back({line, take_fields()});
    }
    return rows;
  }

 private:
  // "\n" or "\r\n"; whether there was one.
  bool take_line_end() {
    const std::size_t length = text_.substr(at_).starts_with("\r\n") ? 2 : 1;
    if (text_[at_] != '\n' && length == 1) return false;
    at_ += length;
    ++line_;
    return true;
  }

  std::vector<std::string> take_fields() {
    std::vector<std::string> fields{take_field()};
    while (at_ < text_.size() && !take_line_end()) {
      ++at_;  // the comma
      fields.push_back(take_field());
    }
    return fields;
  }

  // Up to the comma or the end of the line.
  std::string take_field() {
    at_ = std::min(text_.size(), text_.find_first_not_of(' ', at_));
    std::string field;
    if (at_ < text_.size() && text_[at_] == '"') field = take_quoted();
    const std::size_t end = std::min(text_.size(), text_.find_first_of(",\n", at_));
    std::string_view rest = text_.substr(at_, end - at_);
    if (end < text_.size() && text_[end] == '\n' && rest.ends_with('\r')) rest.remove_suffix(1);
    at_ += rest.size();
    return field.append(rest);
  }

  std::string take_quoted() {
    const int64_t begin = line_;
    std::string field;
    for (++at_; at_ < text_.size(); ++at_) {
      if (text_[at_] == '"' && !text_.substr(at_ + 1).starts_with('"')) {
        ++at_;
        return field;
      }
      if (text_[at_] == '"') ++at_;
      if (text_[at_] == '\n') ++line_;
      field.push_back(text_[at_]);
    }
    throw DataError(fmt::format("{} line {}: a quote is opened that nothing closes", name_, begin));
  }

  std::string_view text_;
  std::string_view name_;
  std::size_t at_ = 0;
  int64_t line_ = 1;
};

}  // namespace

std::vector<CsvRow> read_csv(std::string_view text, std::string_view name) {
  return CsvReader(text, name).read();
}

}  // namespace normformer
