#include <functional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"
#include "normformer/data/bpe_tokenizer.h"

#include "byte_alphabet.h"
#include "json_file.h"
#include "output_file.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::size_t kMostBytes = std::size_t{64} << 20;

/// A merge as a file writes it, in the printable alphabet, and where it stands ("merges.txt line 3").
struct WrittenMerge {
  std::string left;
  std::string right;
  std::string place;
};

WrittenMerge split_merge(std::string_view line, std::string place) {
  const std::size_t space = line.find(' ');
  const bool two_parts = space != std::string_view::npos && space > 0 && space + 1 < line.size() &&
                         line.find(' ', space + 1) == std::string_view::npos;
  if (!two_parts) {
    throw DataError(fmt::format("{} should hold two tokens with one space between, not \"{}\"", place, line));
  }
  return {std::string(line.substr(0, space)), std::string(line.substr(space + 1)), std::move(place)};
}

std::vector<WrittenMerge> parse_merges(std::string_view text, const std::string& name) {
  std::vector<WrittenMerge> merges;
  int64_t number = 0;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    const bool heading = number == 1 && line.starts_with("#version");
    if (heading || (line.empty() && text.empty())) continue;
    merges.push_back(split_merge(line, fmt::format("{} line {}", name, number)));
  }
  return merges;
}

/// The tokens of a JSON object of names and ids, by id.
std::vector<std::string> tokens_by_id(const Json& vocabulary, const std::string& name) {
  if (!vocabulary.is_object()) {
    throw DataError(fmt::format("{} should map tokens to ids with one JSON object", name));
  }
  const std::size_t size = vocabulary.size();
  std::vector<std::string> tokens(size);
  std::vector<bool> seen(size, false);
  for (const auto& [token, id] : vocabulary.items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<uint64_t>() >= size) {
      throw DataError(fmt::format("{}: token \"{}\" has the id {}; the ids of {} tokens are 0 to {}", name,
                                  token, id.dump(), size, size - 1));
    }
    const auto index = id.get<std::size_t>();
    if (seen[index]) {
      throw DataError(
          fmt::format("{}: tokens \"{}\" and \"{}\" have the same id {}", name, tokens[index], token, index));
    }
    seen[index] = true;
    tokens[index] = token;
  }
  return tokens;
}

/// Tokens and merges as files write them to a tokenizer. What neither a byte nor a merge makes is special,
/// and written as plain text, not in the printable alphabet.
BpeTokenizer from_written(std::vector<std::string> written, const std::vector<WrittenMerge>& written_merges,
                          const std::string& name) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (std::size_t id = 0; id < written.size(); ++id) ids.emplace(written[id], static_cast<int32_t>(id));

  std::unordered_set<std::string> made;
  std::vector<BpeMerge> merges;
  for (const WrittenMerge& merge : written_merges) {
    const auto left = ids.find(merge.left);
    const auto right = ids.find(merge.right);
    const std::string result = merge.left + merge.right;
    const bool complete = left != ids.end() && right != ids.end() && ids.contains(result);
    if (!complete) {
      const std::string& missing = left == ids.end() ? merge.left : right == ids.end() ? merge.right : result;
      throw DataError(fmt::format("{} needs the token \"{}\", which {} lacks", merge.place, missing, name));
    }
    merges.push_back({left->second, right->second});
    made.insert(result);
  }

  std::vector<std::string> tokens;
  for (const std::string& token : written) {
    const auto bytes = from_alphabet(token);
    const bool ordinary = (bytes && bytes->size() == 1) || made.contains(token);
    if (ordinary && !bytes) {
      throw DataError(
          fmt::format("{}: a merge makes \"{}\", which has characters outside of the byte-level "
                      "alphabet; this is not a byte-level BPE",
                      name, token));
    }
    tokens.push_back(ordinary ? *bytes : token);
  }
  return BpeTokenizer(std::move(tokens), std::move(merges), name);
}

const Json& member(const Json& object, const char* key, const std::string& name) {
  const auto found = object.find(key);
  if (found == object.end()) throw DataError(fmt::format("{} has no \"{}\"", name, key));
  return *found;
}

bool is_set(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && !found->is_null() && *found != Json(false) && *found != Json("");
}

/// Refuses every feature of a tokenizer.json that would give other ids than GPT-2's pieces and merges.
void require_gpt2_steps(const Json& root, const Json& model, const std::string& name) {
  if (model.value("type", "BPE") != "BPE") {
    throw DataError(
        fmt::format("{} holds a {} model; only byte-level BPE is known", name, model["type"].dump()));
  }
  for (const char* feature :
       {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"}) {
    if (is_set(model, feature)) {
      throw DataError(fmt::format("{} sets the model's \"{}\", which is not supported", name, feature));
    }
  }
  if (is_set(root, "normalizer")) {
    throw DataError(
        fmt::format("{} has a normalizer, which would change the text; only GPT-2's steps are known", name));
  }
  const Json& steps = member(root, "pre_tokenizer", name);
  const bool gpt2 = steps.is_object() && steps.value("type", "") == "ByteLevel" &&
                    steps.value("use_regex", true) && !is_set(steps, "add_prefix_space");
  if (!gpt2) {
    throw DataError(
        fmt::format("{} cuts text otherwise than GPT-2 (its pre_tokenizer is {}); only ByteLevel with "
                    "use_regex and without add_prefix_space is known",
                    name, steps.dump().substr(0, 200)));
  }
}

/// Adds the tokens of "added_tokens" to a vocabulary in which they may already stand.
void add_tokens(const Json& added, Json& vocabulary, const std::string& name) {
  for (const Json& token : added) {
    const Json& content = member(token, "content", name);
    const Json& id = member(token, "id", name);
    const auto [place, inserted] = vocabulary.emplace(content.get<std::string>(), id);
    if (!inserted && *place != id) {
      throw DataError(fmt::format("{}: the added token {} has the ids {} and {}", name, content.dump(),
                                  id.dump(), place->dump()));
    }
  }
}

void require_special(const BpeTokenizer& tokenizer, const Json& added, const std::string& name) {
  std::unordered_set<int32_t> special(tokenizer.special_tokens().begin(), tokenizer.special_tokens().end());
  for (const Json& token : added) {
    if (!special.contains(token["id"].get<int32_t>())) {
      throw DataError(fmt::format("{}: the added token {} is also an ordinary token, which is not supported",
                                  name, token["content"].dump()));
    }
  }
}

BpeTokenizer from_tokenizer_json(const Json& root, const std::string& name) {
  const Json& model = member(root, "model", name);
  require_gpt2_steps(root, model, name);
  Json vocabulary = member(model, "vocab", name);
  const Json added = root.value("added_tokens", Json::array());
  add_tokens(added, vocabulary, name);

  std::vector<WrittenMerge> merges;
  for (const Json& merge : member(model, "merges", name)) {
    std::string place = fmt::format("{} merge {}", name, merges.size());
    if (merge.is_string()) {
      merges.push_back(split_merge(merge.get<std::string>(), std::move(place)));
    } else if (merge.is_array() && merge.size() == 2) {
      merges.push_back({merge[0].get<std::string>(), merge[1].get<std::string>(), std::move(place)});
    } else {
      throw DataError(fmt::format("{} is {}, not a pair of tokens", place, merge.dump()));
    }
  }
  BpeTokenizer tokenizer = from_written(tokens_by_id(vocabulary, name), merges, name);
  require_special(tokenizer, added, name);
  return tokenizer;
}

}  // namespace

BpeTokenizer BpeTokenizer::load(const fs::path& where) {
  if (!fs::exists(where)) throw IoError(fmt::format("the tokenizer {} does not exist", where.string()));
  if (!fs::is_directory(where)) return load_tokenizer_json(where);
  if (fs::exists(where / "tokenizer.json")) return load_tokenizer_json(where / "tokenizer.json");
  for (const auto& [vocabulary, merges] :
       {std::pair{"vocab.json", "merges.txt"}, {"encoder.json", "vocab.bpe"}}) {
    if (fs::exists(where / vocabulary) && fs::exists(where / merges)) {
      return load(where / vocabulary, where / merges);
    }
  }
  throw DataError(
      fmt::format("the folder {} holds no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, "
                  "nor encoder.json "
                  "and vocab.bpe",
                  where.string()));
}

BpeTokenizer BpeTokenizer::load(const fs::path& vocabulary, const fs::path& merges) {
  const Json object = read_json_file(vocabulary, "the vocabulary");
  const std::string text = read_small_file(merges, kMostBytes, "the list of merges");
  return from_written(tokens_by_id(object, vocabulary.string()), parse_merges(text, merges.string()),
                      vocabulary.string());
}

BpeTokenizer BpeTokenizer::load_tokenizer_json(const fs::path& path) {
  const Json root = read_json_file(path, "the tokenizer");
  try {
    return from_tokenizer_json(root, path.string());
  } catch (const Json::exception&) {
    throw DataError(
        fmt::format("{} has not the structure of a tokenizer.json with a BPE model", path.string()));
  }
}

void BpeTokenizer::save(const fs::path& folder) const {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw IoError(fmt::format("cannot make the folder {}: {}", folder.string(), error.message()));

  const std::unordered_set<int32_t> special(special_.begin(), special_.end());
  std::string vocabulary = "{";
  for (int32_t id = 0; id < vocab_size(); ++id) {
    const std::string text = special.contains(id) ? tokens_[id] : to_alphabet(tokens_[id]);
    vocabulary += fmt::format("{}{}: {}", id == 0 ? "" : ", ", Json(text).dump(-1, ' ', true), id);
  }
  vocabulary += "}";

  std::string merges = "#version: 0.2\n";
  for (const BpeMerge& merge : merges_) {
    merges += fmt::format("{} {}\n", to_alphabet(tokens_[merge.left]), to_alphabet(tokens_[merge.right]));
  }
  write_file_atomically(folder / "vocab.json", std::as_bytes(std::span(vocabulary)));
  write_file_atomically(folder / "merges.txt", std::as_bytes(std::span(merges)));
}

}  // namespace normformer
