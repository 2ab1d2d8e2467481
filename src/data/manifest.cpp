#include "normformer/data/manifest.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include <fmt/format.h>
#include <xxhash.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"
#include "normformer/data/indexed_dataset.h"

#include "json_file.h"
#include "output_file.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::string_view kFormat = "normformer corpus";
constexpr int64_t kVersion = 1;

std::string hex(uint64_t value) { return fmt::format("{:016x}", value); }

uint64_t from_hex(const std::string& text, const std::string& name) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw DataError(fmt::format("{}: \"{}\" is not a hash of 16 hexadecimal digits", name, text));
  }
  return value;
}

/// The whole number under `key`, which must lie in [least, most].
int64_t number_at(const nlohmann::json& json, const char* key, int64_t least, int64_t most,
                  const std::string& name) {
  const nlohmann::json& value = json.at(key);
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<uint64_t>() <= static_cast<uint64_t>(most)) &&
                    value.get<int64_t>() >= least && value.get<int64_t>() <= most;
  if (fits) return value.get<int64_t>();
  throw DataError(fmt::format("{}: \"{}\" is {}, not a whole number from {} to {}", name, key, value.dump(),
                              least, most));
}

int64_t count_at(const nlohmann::json& json, const char* key, const std::string& name) {
  return number_at(json, key, 0, std::numeric_limits<int64_t>::max(), name);
}

/// The name under `key` of something in the manifest's folder.
std::string file_name_at(const nlohmann::json& json, const char* key, const std::string& name) {
  auto value = json.at(key).get<std::string>();
  if (value.empty() || value == "." || value == ".." || value.find('/') != std::string::npos) {
    throw DataError(
        fmt::format("{}: \"{}\" is \"{}\", which names nothing in the manifest's folder", name, key, value));
  }
  return value;
}

CorpusSplit split_from(const nlohmann::json& json, const std::string& name) {
  CorpusSplit split;
  split.name = json.at("name").get<std::string>();
  split.dataset = file_name_at(json, "dataset", name);
  split.documents = count_at(json, "documents", name);
  split.tokens = count_at(json, "tokens", name);
  split.bytes = count_at(json, "bytes", name);
  split.tokens_hash = from_hex(json.at("bin_xxh3").get<std::string>(), name);
  split.index_hash = from_hex(json.at("idx_xxh3").get<std::string>(), name);
  return split;
}

CorpusManifest manifest_from(const nlohmann::json& json, const fs::path& path) {
  const std::string name = path.string();
  if (json.value("format", "") != kFormat) {
    throw DataError(fmt::format("{} is not the manifest of a prepared corpus", name));
  }
  if (const int64_t version = count_at(json, "version", name); version != kVersion) {
    throw DataError(
        fmt::format("{} has version {}; version {} is the only one known", name, version, kVersion));
  }
  CorpusManifest manifest;
  manifest.folder = path.parent_path();
  manifest.tokenizer = file_name_at(json, "tokenizer", name);
  manifest.tokenizer_hash = from_hex(json.at("tokenizer_xxh3").get<std::string>(), name);
  manifest.vocab_size = number_at(json, "vocab_size", 1, kAnyVocabulary, name);
  manifest.unicode_version = json.at("unicode_version").get<std::string>();
  if (!json.at("end_of_document").is_null()) {
    manifest.end_of_document =
        static_cast<int32_t>(number_at(json, "end_of_document", 0, manifest.vocab_size - 1, name));
  }
  manifest.invalid_utf8 = json.at("invalid_utf8").get<std::string>();
  manifest.replaced = count_at(json, "replaced", name);
  for (const auto& split : json.at("splits")) manifest.splits.push_back(split_from(split, name));
  return manifest;
}

fs::path without_suffix(const fs::path& given) {
  const bool suffix = given.extension() == ".bin" || given.extension() == ".idx";
  return suffix ? given.parent_path() / given.stem() : given;
}

const CorpusSplit* find_split(const CorpusManifest& manifest, const fs::path& prefix) {
  const auto found =
      std::find_if(manifest.splits.begin(), manifest.splits.end(),
                   [&](const CorpusSplit& split) { return split.dataset == prefix.filename().string(); });
  return found == manifest.splits.end() ? nullptr : &*found;
}

CorpusManifest require_manifest(const fs::path& prefix) {
  auto manifest = find_corpus_manifest(prefix);
  if (!manifest) {
    throw DataError(
        fmt::format("{} has no manifest beside it, which `normformer prepare` writes; name its "
                    "tokenizer and vocabulary size instead",
                    prefix.string()));
  }
  return *std::move(manifest);
}

void require_hash(const fs::path& path, uint64_t expected) {
  const MappedFile file(path);
  file.expect_sequential_reading();
  const uint64_t actual = XXH3_64bits(file.bytes().data(), file.size());
  if (actual != expected) {
    throw DataError(fmt::format("{} has changed since it was prepared: its XXH3 is {}, not {}", path.string(),
                                hex(actual), hex(expected)));
  }
}

}  // namespace

void write_corpus_manifest(const CorpusManifest& manifest, std::string_view name) {
  Json json;
  json["format"] = kFormat;
  json["version"] = kVersion;
  json["vocab_size"] = manifest.vocab_size;
  json["tokenizer"] = manifest.tokenizer;
  json["tokenizer_xxh3"] = hex(manifest.tokenizer_hash);
  json["unicode_version"] = manifest.unicode_version;
  json["end_of_document"] = manifest.end_of_document ? Json(*manifest.end_of_document) : Json(nullptr);
  json["invalid_utf8"] = manifest.invalid_utf8;
  json["replaced"] = manifest.replaced;
  json["splits"] = Json::array();
  for (const CorpusSplit& split : manifest.splits) {
    json["splits"].push_back({{"name", split.name},
                              {"dataset", split.dataset},
                              {"documents", split.documents},
                              {"tokens", split.tokens},
                              {"bytes", split.bytes},
                              {"bin_xxh3", hex(split.tokens_hash)},
                              {"idx_xxh3", hex(split.index_hash)}});
  }
  const std::string text = json.dump(2) + "\n";
  write_file_atomically(manifest.folder / (std::string(name) + ".json"), std::as_bytes(std::span(text)));
}

CorpusManifest read_corpus_manifest(const fs::path& path) {
  const nlohmann::json json = read_json_file(path, "the manifest");
  try {
    return manifest_from(json, path);
  } catch (const nlohmann::json::exception& e) {
    throw DataError(fmt::format("the manifest {} is incomplete: {}", path.string(), e.what()));
  }
}

std::optional<CorpusManifest> find_corpus_manifest(const fs::path& dataset_prefix) {
  const fs::path prefix = without_suffix(dataset_prefix);
  const std::string whole = prefix.string();
  for (const std::string_view ending : {"", "_train", "_valid"}) {
    if (!whole.ends_with(ending)) continue;
    const fs::path path = whole.substr(0, whole.size() - ending.size()) + ".json";
    if (!fs::exists(path)) continue;
    CorpusManifest manifest = read_corpus_manifest(path);
    if (find_split(manifest, prefix) != nullptr) return manifest;
  }
  return std::nullopt;
}

BpeTokenizer load_corpus_tokenizer(const fs::path& dataset_prefix) {
  const CorpusManifest manifest = require_manifest(dataset_prefix);
  const fs::path folder = manifest.folder / manifest.tokenizer;
  BpeTokenizer tokenizer = BpeTokenizer::load(folder);
  if (tokenizer.hash() != manifest.tokenizer_hash) {
    throw DataError(fmt::format("the tokenizer {} is not the one that {} was prepared with; prepare it again",
                                folder.string(), dataset_prefix.string()));
  }
  return tokenizer;
}

void verify_corpus(const fs::path& dataset_prefix) {
  constexpr int64_t kTokensAtOnce = int64_t{1} << 20;
  const fs::path prefix = without_suffix(dataset_prefix);
  const CorpusManifest manifest = require_manifest(prefix);
  const CorpusSplit& split = *find_split(manifest, prefix);
  require_hash(prefix.string() + ".idx", split.index_hash);
  require_hash(prefix.string() + ".bin", split.tokens_hash);
  const IndexedDataset dataset(prefix, manifest.vocab_size);
  if (dataset.num_tokens() != split.tokens || dataset.num_documents() != split.documents) {
    throw DataError(fmt::format("{} holds {} tokens in {} documents; its manifest says {} in {}",
                                prefix.string(), dataset.num_tokens(), dataset.num_documents(), split.tokens,
                                split.documents));
  }
  std::vector<int32_t> tokens;
  for (int64_t position = 0; position < split.tokens; position += kTokensAtOnce) {
    tokens.resize(std::min(kTokensAtOnce, split.tokens - position));
    dataset.read(position, tokens);
  }
}

}  // namespace normformer
