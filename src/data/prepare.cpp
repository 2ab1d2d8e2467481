#include "normformer/data/prepare.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/core/log.h"
#include "normformer/core/philox.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/bpe_trainer.h"
#include "normformer/data/indexed_dataset.h"

#include "corpus_reader.h"
#include "corpus_text.h"
#include "parallel_for.h"
#include "progress_line.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

void require_valid(const PrepareOptions& options) {
  if (options.inputs.empty()) throw ConfigError("no input is given; name files or folders of text");
  if (options.output.filename().empty()) {
    throw ConfigError(
        fmt::format("the output \"{}\" is no prefix of file names; write for example \"{}corpus\"",
                    options.output.string(), options.output.string()));
  }
  if (options.tokenizer.empty() == (options.train_vocab_size == 0)) {
    throw ConfigError(
        "give either a tokenizer (--tokenizer) or the size of a vocabulary to train (--train-vocab), and not "
        "both");
  }
  const double fraction = options.valid_fraction;
  if (!(fraction >= 0 && fraction < 1)) {
    throw ConfigError(
        fmt::format("a validation share of {} is impossible; give one from 0 to below 1", fraction));
  }
  if (fraction > 0 && !options.valid_inputs.empty()) {
    throw ConfigError(
        "give either files for validation (--valid) or a share of the documents (--valid-fraction), and not "
        "both");
  }
  if ((options.documents == DocumentRule::separator) == options.separator.empty()) {
    throw ConfigError("a separator line belongs to documents that are divided by one, and only to those");
  }
  if (options.separator.find('\n') != std::string::npos) {
    throw ConfigError("the separator between documents must be a single line");
  }
  if (options.threads < 0) throw ConfigError(fmt::format("{} threads are impossible", options.threads));
}

/// Draws documents for validation: one, anywhere, out of every 1 / share consecutive ones.
class ValidationDraw {
 public:
  ValidationDraw(double share, uint64_t seed)
      : share_(static_cast<uint64_t>(std::llround(share * 0x1p32))),
        stream_(RandomStream{seed}.with("validation documents")) {}

  bool takes(int64_t document) const {
    if (share_ == 0) return false;
    const auto stratum = static_cast<uint64_t>((Wide{static_cast<uint64_t>(document)} * share_) >> 32);
    const uint64_t begin = first_of(stratum);
    const uint64_t size = first_of(stratum + 1) - begin;
    return static_cast<uint64_t>(document) == begin + stream_.u64(stratum) % size;
  }

 private:
  __extension__ using Wide = unsigned __int128;

  /// The first document n with n * share >= stratum.
  uint64_t first_of(uint64_t stratum) const {
    return static_cast<uint64_t>(((Wide{stratum} << 32) + share_ - 1) / share_);
  }

  uint64_t share_;  ///< in 2^-32
  RandomStream stream_;
};

/// Where the documents of one dataset go.
struct Output {
  Output(const PrepareOptions& options, std::string name_, int64_t vocab_size)
      : name(std::move(name_)),
        prefix(options.output.string() + (name == "all" ? "" : "_" + name)),
        writer(prefix, vocab_size) {}

  CorpusSplit finish() {
    const WrittenDataset written = writer.finish();
    return {name,  prefix.filename().string(), written.num_documents, written.num_tokens,
            bytes, written.tokens_hash,        written.index_hash};
  }

  std::string name;
  fs::path prefix;
  IndexedDatasetWriter writer;
  int64_t bytes = 0;
  int64_t open_tokens = 0;  ///< of the document that is being written
};

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options)
      : options_(options),
        threads_(options.threads > 0 ? options.threads
                                     : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))),
        files_(list_corpus_files(options.inputs)),
        valid_files_(list_corpus_files(options.valid_inputs)),
        draw_(options.valid_fraction, options.seed) {}

  CorpusManifest run();

 private:
  BpeTokenizer make_tokenizer();
  void for_each_batch(const std::vector<fs::path>& files, const std::string& what,
                      const std::function<void(const CorpusBatch&, ProgressLine&)>& use);
  void encode(const std::vector<fs::path>& files, const BpeTokenizer& tokenizer, Output& output,
              Output* drawn_output);
  void write(const CorpusChunk& chunk, const std::vector<int32_t>& ids, int64_t bytes, Output& output);
  void require_documents(const std::vector<std::unique_ptr<Output>>& outputs) const;

  const PrepareOptions& options_;
  int threads_;
  std::vector<fs::path> files_;
  std::vector<fs::path> valid_files_;
  ValidationDraw draw_;
  std::optional<int32_t> end_of_document_;
  std::atomic<int64_t> replaced_{0};
};

void Preparation::for_each_batch(const std::vector<fs::path>& files, const std::string& what,
                                 const std::function<void(const CorpusBatch&, ProgressLine&)>& use) {
  int64_t total = 0;
  for (const fs::path& file : files) total += static_cast<int64_t>(fs::file_size(file));
  ProgressLine progress(what, total, options_.show_progress);
  CorpusReader reader(files, options_.documents, options_.separator);
  while (const auto batch = reader.read()) use(*batch, progress);
  progress.finish();
}

BpeTokenizer Preparation::make_tokenizer() {
  if (!options_.tokenizer.empty()) return BpeTokenizer::load(options_.tokenizer);
  std::vector<WordCounts> counts(threads_);
  for_each_batch(files_, "counting words", [&](const CorpusBatch& batch, ProgressLine& progress) {
    parallel_for(threads_, static_cast<int64_t>(batch.chunks.size()), [&](int thread, int64_t i) {
      const CorpusChunk& chunk = batch.chunks[i];
      if (draw_.takes(chunk.document)) return;
      counts[thread].add(ChunkText(chunk, options_.json_key, options_.invalid_utf8).text());
    });
    progress.advance(batch.bytes);
  });
  for (std::size_t i = 1; i < counts.size(); ++i) counts[0].add(counts[i]);
  if (counts[0].empty()) {
    throw DataError(fmt::format("the corpus is empty: there is no text in {} to train a vocabulary on",
                                options_.inputs[0].string()));
  }
  BpeTokenizer tokenizer = train_bpe(counts[0], {.vocab_size = options_.train_vocab_size});
  if (tokenizer.vocab_size() < options_.train_vocab_size) {
    log_root(LogLevel::warning, "the corpus gives a vocabulary of {} tokens only, not {}",
             tokenizer.vocab_size(), options_.train_vocab_size);
  }
  return tokenizer;
}

void Preparation::encode(const std::vector<fs::path>& files, const BpeTokenizer& tokenizer, Output& output,
                         Output* drawn_output) {
  std::vector<BpeEncoder> encoders;
  for (int i = 0; i < threads_; ++i) encoders.emplace_back(tokenizer);
  for_each_batch(files, "encoding", [&](const CorpusBatch& batch, ProgressLine& progress) {
    std::vector<std::vector<int32_t>> ids(batch.chunks.size());
    std::vector<int64_t> bytes(batch.chunks.size());
    parallel_for(threads_, static_cast<int64_t>(batch.chunks.size()), [&](int thread, int64_t i) {
      const ChunkText chunk(batch.chunks[i], options_.json_key, options_.invalid_utf8);
      ids[i].reserve(chunk.text().size() / 3);
      encoders[thread].encode(chunk.text(), ids[i]);
      bytes[i] = static_cast<int64_t>(chunk.text().size());
      replaced_ += chunk.replaced();
    });
    for (std::size_t i = 0; i < batch.chunks.size(); ++i) {
      const bool drawn = drawn_output != nullptr && draw_.takes(batch.chunks[i].document);
      write(batch.chunks[i], ids[i], bytes[i], drawn ? *drawn_output : output);
    }
    progress.advance(batch.bytes);
  });
}

void Preparation::write(const CorpusChunk& chunk, const std::vector<int32_t>& ids, int64_t bytes,
                        Output& output) {
  output.bytes += bytes;
  output.open_tokens += static_cast<int64_t>(ids.size());
  if (output.open_tokens == 0) return;
  output.writer.append(ids);
  if (!chunk.ends_document) return;
  if (end_of_document_) output.writer.append({&*end_of_document_, 1});
  output.writer.end_document();
  output.open_tokens = 0;
}

void Preparation::require_documents(const std::vector<std::unique_ptr<Output>>& outputs) const {
  for (const auto& output : outputs) {
    if (output->writer.num_documents() > 0) continue;
    if (options_.valid_fraction > 0) {
      throw DataError(fmt::format(
          "a share of {} of the documents leaves none for {}: choose another share, cut the text into more "
          "documents (--documents blank-lines), or give validation files of their own",
          options_.valid_fraction, output->name == "valid" ? "validation" : "training"));
    }
    throw DataError(fmt::format(
        "the {} is empty: there is no text in {}", output->name == "valid" ? "validation corpus" : "corpus",
        (output->name == "valid" ? options_.valid_inputs : options_.inputs)[0].string()));
  }
}

CorpusManifest Preparation::run() {
  const fs::path folder = options_.output.parent_path();
  const std::string name = options_.output.filename().string();
  std::error_code error;
  if (!folder.empty()) fs::create_directories(folder, error);
  if (error) throw IoError(fmt::format("cannot make the folder {}: {}", folder.string(), error.message()));

  const BpeTokenizer tokenizer = make_tokenizer();
  if (options_.append_end_of_document) {
    end_of_document_ = tokenizer.end_of_text();
    if (!end_of_document_) {
      throw ConfigError(
          fmt::format("the tokenizer {} has no token <|endoftext|> to end documents with; prepare "
                      "without end-of-document tokens (--no-end-of-document)",
                      options_.tokenizer.string()));
    }
  }

  const bool split = options_.valid_fraction > 0 || !valid_files_.empty();
  std::vector<std::unique_ptr<Output>> outputs;
  outputs.push_back(std::make_unique<Output>(options_, split ? "train" : "all", tokenizer.vocab_size()));
  if (split) outputs.push_back(std::make_unique<Output>(options_, "valid", tokenizer.vocab_size()));
  encode(files_, tokenizer, *outputs[0], options_.valid_fraction > 0 ? outputs[1].get() : nullptr);
  if (!valid_files_.empty()) encode(valid_files_, tokenizer, *outputs[1], nullptr);
  require_documents(outputs);

  CorpusManifest manifest;
  manifest.folder = folder;
  manifest.tokenizer = name + "_tokenizer";
  manifest.tokenizer_hash = tokenizer.hash();
  manifest.vocab_size = tokenizer.vocab_size();
  manifest.unicode_version = unicode_version();
  manifest.end_of_document = end_of_document_;
  manifest.invalid_utf8 = name_of(options_.invalid_utf8);
  manifest.replaced = replaced_;
  // An older manifest of this name must not be found beside these files.
  fs::remove(folder / (name + ".json"));
  tokenizer.save(folder / manifest.tokenizer);
  for (auto& output : outputs) manifest.splits.push_back(output->finish());
  write_corpus_manifest(manifest, name);
  return manifest;
}

}  // namespace

CorpusManifest prepare_corpus(const PrepareOptions& options) {
  require_valid(options);
  try {
    return Preparation(options).run();
  } catch (const fs::filesystem_error& e) {
    throw IoError(e.what());
  }
}

}  // namespace normformer
