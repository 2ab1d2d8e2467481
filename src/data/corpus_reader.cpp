#include "corpus_reader.h"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/data/pretokenizer.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kChunkBytes = std::size_t{1} << 20;
constexpr int64_t kBatchBytes = int64_t{32} << 20;
constexpr std::size_t kBatchFiles = 4096;  // a process may map some 65 000 files at once
constexpr std::size_t kLongestJsonLine = std::size_t{64} << 20;

bool is_blank(std::string_view line) { return line.find_first_not_of(" \t\r\v\f") == std::string_view::npos; }

bool holds_json(const fs::path& path) {
  const std::string extension = path.extension().string();
  return extension == ".jsonl" || extension == ".ndjson" || extension == ".json";
}

void refuse_compressed(const fs::path& path) {
  constexpr std::array<std::string_view, 6> kCompressed = {".gz", ".xz", ".zst", ".bz2", ".zip", ".lz4"};
  if (std::find(kCompressed.begin(), kCompressed.end(), path.extension().string()) != kCompressed.end()) {
    throw DataError(fmt::format("{} is compressed; unpack it first", path.string()));
  }
}

std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const bool hidden = entry->path().filename().string().starts_with('.');
    if (hidden && entry->is_directory()) entry.disable_recursion_pending();
    if (!hidden && entry->is_regular_file()) files.push_back(entry->path());
  }
  if (error) throw IoError(fmt::format("cannot read the folder {}: {}", folder.string(), error.message()));
  if (files.empty()) throw DataError(fmt::format("the folder {} holds no files", folder.string()));
  std::sort(files.begin(), files.end(),
            [](const fs::path& a, const fs::path& b) { return a.native() < b.native(); });
  return files;
}

}  // namespace

std::vector<fs::path> list_corpus_files(const std::vector<fs::path>& inputs) {
  std::vector<fs::path> files;
  for (const fs::path& input : inputs) {
    if (!fs::exists(input)) throw IoError(fmt::format("the input {} does not exist", input.string()));
    const std::vector<fs::path> more =
        fs::is_directory(input) ? files_below(input) : std::vector<fs::path>{input};
    files.insert(files.end(), more.begin(), more.end());
  }
  for (const fs::path& file : files) refuse_compressed(file);
  return files;
}

CorpusReader::CorpusReader(std::vector<fs::path> files, DocumentRule rule, std::string separator)
    : files_(std::move(files)), rule_(rule), separator_(std::move(separator)) {}

std::optional<CorpusBatch> CorpusReader::read() {
  CorpusBatch batch;
  if (file_) batch.files.push_back(file_);
  while (batch.bytes < kBatchBytes && batch.files.size() < kBatchFiles) {
    if (document_rest_.empty() && !find_document()) {
      if (!open_next_file(batch)) break;
      continue;
    }
    batch.chunks.push_back(take_chunk());
    batch.bytes += static_cast<int64_t>(batch.chunks.back().raw.size());
  }
  return batch.chunks.empty() && !file_ ? std::nullopt : std::optional(std::move(batch));
}

bool CorpusReader::open_next_file(CorpusBatch& batch) {
  file_.reset();
  rest_ = {};
  if (next_file_ == files_.size()) return false;
  file_ = std::make_shared<const MappedFile>(files_[next_file_]);
  file_->expect_sequential_reading();
  batch.files.push_back(file_);
  is_json_ = holds_json(files_[next_file_]);
  rest_ = file_->text();
  line_ = 0;
  ++next_file_;
  return true;
}

bool CorpusReader::find_document() {
  if (!file_) return false;
  const bool found = is_json_ ? find_json_line() : find_text_document();
  if (found) ++document_;
  return found;
}

bool CorpusReader::find_json_line() {
  while (!rest_.empty()) {
    const std::string_view line = take_line();
    if (line.size() > kLongestJsonLine) {
      throw DataError(
          fmt::format("{} line {} has {} bytes; {} is the most that is accepted in one line of JSON",
                      file_->path().string(), line_, line.size(), kLongestJsonLine));
    }
    if (is_blank(line)) continue;
    document_rest_ = line;
    return true;
  }
  return false;
}

bool CorpusReader::find_text_document() {
  if (rule_ == DocumentRule::file) {
    document_rest_ = std::exchange(rest_, {});
    return !document_rest_.empty();
  }
  const char* begin = nullptr;
  const char* end = nullptr;
  while (!rest_.empty()) {
    const std::string_view line = take_line();
    // One empty line between separators is a document without text.
    const bool has_text = begin != nullptr && end > begin;
    if (is_separator(line)) {
      if (has_text) break;
      begin = nullptr;
      continue;
    }
    if (begin == nullptr) begin = line.data();
    end = line.data() + line.size();
  }
  if (begin == nullptr || end == begin) return false;
  document_rest_ = std::string_view(begin, static_cast<std::size_t>(end - begin));
  return true;
}

bool CorpusReader::is_separator(std::string_view line) const {
  if (rule_ == DocumentRule::blank_lines) return is_blank(line);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line == separator_;
}

std::string_view CorpusReader::take_line() {
  const std::size_t end = std::min(rest_.find('\n'), rest_.size());
  const std::string_view line = rest_.substr(0, end);
  rest_.remove_prefix(std::min(end + 1, rest_.size()));
  ++line_;
  return line;
}

CorpusChunk CorpusReader::take_chunk() {
  const bool cut = !is_json_ && document_rest_.size() > kChunkBytes;
  const std::size_t length = cut ? safe_cut(document_rest_, kChunkBytes) : document_rest_.size();
  CorpusChunk chunk;
  chunk.raw = document_rest_.substr(0, length);
  chunk.file = file_.get();
  chunk.line = line_;
  chunk.document = document_;
  chunk.is_json = is_json_;
  document_rest_.remove_prefix(length);
  chunk.ends_document = document_rest_.empty();
  return chunk;
}

}  // namespace normformer
