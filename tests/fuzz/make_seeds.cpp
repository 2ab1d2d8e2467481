// make_fuzz_seeds CORPUS FIXTURES CONFIGS: writes one valid input or a few for each fuzz target into
// CORPUS/<target>/.
#include <cstdio>
#include <cstring>

#include <fmt/format.h>

#include "normformer/checkpoints/safetensors.h"
#include "normformer/comm/group.h"
#include "normformer/comm/ledger_file.h"
#include "normformer/config/run_config.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/indexed_dataset.h"

#include "byte_alphabet.h"
#include "faults/memory_files.h"
#include "faults/toy_checkpoint.h"
#include "ledger_words.h"
#include "small_corpus.h"
#include "support/manifest_frame.h"
#include "unit/data/temporary_folder.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

class Seeds {
 public:
  Seeds(fs::path corpus, fs::path fixtures, fs::path configs)
      : corpus_(std::move(corpus)), fixtures_(std::move(fixtures)), configs_(std::move(configs)) {}

  void write_all() const {
    write_checkpoints();
    write_token_files();
    write_safetensors();
    write_configurations();
    write_prepared();
    write_texts();
    write_tasks();
    write_ledgers();
  }

 private:
  void put(std::string_view target, std::string_view name, std::string_view bytes) const {
    fs::create_directories(corpus_ / target);
    write_bytes(corpus_ / target / name, bytes);
  }

  static std::string part(std::string_view bytes) {
    NF_CHECK(bytes.size() < 65536, "a part of {} bytes", bytes.size());
    return raw_bytes(static_cast<uint16_t>(bytes.size())) + std::string(bytes);
  }

  void write_checkpoints() const {
    const fs::path stored = fixtures_ / "checkpoints/version-1/step-0000000007";
    put("manifest_fuzz", "version-1", payload_in(read_bytes(stored / kManifestName)));
    put("manifest_fuzz", "version-1-framed", read_bytes(stored / kManifestName));

    MemoryFiles files;
    Context context(DeviceKind::cpu);
    std::vector<TensorPiece> pieces = toy_pieces(context, {}, 0, 1, true);
    std::erase_if(pieces, [](const TensorPiece& piece) { return piece.range.size() > 20; });
    const SaveResult saved = save_checkpoint(make_self_world(), files, "/run", toy_info(1), pieces,
                                             {.keep = 1, .block_bytes = 16});
    NF_CHECK(saved.saved, "{}", saved.reason);
    std::string data;
    for (const std::string& name : files.list(saved.folder)) {
      if (name != kManifestName) data += files.content(saved.folder / name);
    }
    const std::string payload = payload_in(files.content(saved.folder / kManifestName));
    put("manifest_fuzz", "one-rank", payload);
    put("checkpoint_fuzz", "as-saved", std::string(1, '\0') + part(payload) + data);
    put("checkpoint_fuzz", "mended", std::string(1, '\1') + part(payload) + data);
  }

  void write_token_files() const {
    const TemporaryFolder folder;
    for (const int64_t vocab_size : {int64_t{300}, int64_t{70'000}}) {
      IndexedDatasetWriter writer(folder / "x", vocab_size, 4);
      for (const std::vector<int32_t>& document : {std::vector<int32_t>{1, 2, 3, 4, 5, 0},
                                                   std::vector<int32_t>{}, std::vector<int32_t>{299, 7, 0}}) {
        writer.add_document(document);
      }
      writer.finish();
      const std::string index = read_bytes(folder / "x.idx");
      const std::string tokens = read_bytes(folder / "x.bin");
      put("indexed_dataset_fuzz", fmt::format("megatron-{}", vocab_size), "\3" + part(index) + tokens);
      // fairseq's index has neither the number of document bounds nor the bounds.
      const auto sequences = static_cast<size_t>(index[18]);
      const std::string fairseq = index.substr(0, 26) + index.substr(34, 12 * sequences);
      put("indexed_dataset_fuzz", fmt::format("fairseq-{}", vocab_size), "\3" + part(fairseq) + tokens);
    }
    std::string llmc(1024, '\0');
    const std::string head = raw_bytes(int32_t{20240520}) + raw_bytes(int32_t{1}) + raw_bytes(int32_t{5});
    llmc.replace(0, head.size(), head);
    for (const uint16_t token : {7, 8, 9, 50256, 11}) llmc += raw_bytes(token);
    put("indexed_dataset_fuzz", "llmc", "\3" + part("") + llmc);
  }

  void write_safetensors() const {
    MemoryFiles files;
    Context context(DeviceKind::cpu);
    const std::vector<SafetensorsPlan> plans = {
        {"a.weight", DType::f32, {2, 3}}, {"b", DType::bf16, {4}},   {"c", DType::i64, {}},
        {"d", DType::u8, {1, 2, 3, 1}},   {"e", DType::f16, {0, 5}}, {"f", DType::f64, {1}}};
    SafetensorsWriter writer(files, "/x", plans);
    for (const SafetensorsPlan& plan : writer.order())
      writer.write(plan.name, context.zeros(plan.shape, plan.dtype));
    writer.finish();
    const std::string file = files.content("/x");
    put("safetensors_fuzz", "six-types", file);
    size_t header = 0;
    std::memcpy(&header, file.data(), sizeof(header));
    put("safetensors_fuzz", "six-types-line", file.substr(8, header) + "\n" + file.substr(8 + header));
  }

  void write_configurations() const {
    for (const char* name : {"baseline", "normformer"}) {
      const std::string text = read_bytes(configs_ / "quickstart" / (std::string(name) + ".toml"));
      put("run_config_fuzz", name, text);
    }
    using namespace std::string_literals;
    put("run_config_fuzz", "defaults", to_toml(RunConfig{}));
    put("run_config_fuzz", "overrides",
        "[data]\ntrain = [{ prefix = 'a', weight = 2 }, 'b']\n"
        "\0train.seed=7\0data.valid=some/where\0parallel.split=[1, 2]"s);
  }

  void write_prepared() const {
    const TemporaryFolder folder;
    const CorpusManifest manifest = prepare_small_corpus(folder / "corpus");
    put("corpus_manifest_fuzz", "prepared", read_bytes(folder / "corpus.json"));
    const std::string vocabulary = read_bytes(folder / manifest.tokenizer / "vocab.json");
    const std::string merges = read_bytes(folder / manifest.tokenizer / "merges.txt");
    const std::string text("\0the cat<|endoftext|> \xff", 24);
    put("tokenizer_fuzz", "two-files", "v" + vocabulary + '\0' + merges + text);
    put("tokenizer_fuzz", "merges", "m" + merges + text);
    const std::string start = R"({"model":{"type":"BPE","vocab":)" + vocabulary + R"(,"merges":)";
    const std::string end = R"(},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},)"
                            R"("added_tokens":[{"id":259,"content":"<|endoftext|>"}]})";
    put("tokenizer_fuzz", "one-file-pairs", "t" + start + R"([["t","h"],["th","e"]])" + end + text);
    put("tokenizer_fuzz", "one-file-lines", "t" + start + R"(["t h","th e"])" + end + text);
  }

  void write_texts() const {
    const std::string text =
        "It's 12 o'clock,  \xc3\xa9t\xc3\xa9!\n\n \n\xff\xe3\x81\x82 we'll\r\n--\nend\t \n";
    for (const char rule : {'\0', '\2', '\4'}) {
      for (const char policy : {'\0', '\x08', '\x10'}) {
        put("corpus_text_fuzz", fmt::format("text-{}", rule + policy),
            static_cast<char>(rule + policy) + text);
      }
    }
    const std::string json =
        "{\"text\": \"a \\u00e9\\ud83d\\ude00 b\", \"n\": [1, 2.5e3, null]}\n\n{\"text\":\"\"}\n[]\n";
    for (const char policy : {'\1', '\x09', '\x11'})
      put("corpus_text_fuzz", fmt::format("json-{}", +policy), policy + json);
    const std::string columns =
        "\xef\xbb\xbfn\tlabel\ta\tb\n0\tyes\tIt's \"quoted\"\t\xc3\xa9\r\n\n1\tno\tx\ty";
    const std::string objects =
        "{\"a\": \"x\\ty\", \"b\": \"\\u00e9\", \"label\": 1}\n\n{\"label\": \"0\", \"b\": \"y\", \"a\": "
        "\"z\"}\n";
    for (const char fields : {'\0', '\2', '\4', '\6', '\x14'}) {
      put("labelled_texts_fuzz", fmt::format("tsv-{}", +fields), fields + columns);
      put("labelled_texts_fuzz", fmt::format("json-{}", +fields), static_cast<char>(fields + 1) + objects);
    }
  }

  // The task's number among known_tasks(), flags and the labels in front of a file of each format.
  void write_tasks() const {
    const std::vector<std::pair<char, const char*>> files = {
        {'\0', "hellaswag.jsonl"},  {'\2', "winogrande.jsonl"},
        {'\3', "openbookqa.jsonl"}, {'\3', "openbookqa.llm-foundry.jsonl"},
        {'\4', "arc.jsonl"},        {'\6', "storycloze.csv"},
        {'\x08', "copa.jsonl"},     {'\x08', "copa.llm-foundry.jsonl"},
        {'\x09', "lambada.jsonl"},  {'\x09', "lambada.llm-foundry.jsonl"}};
    const fs::path folder = fixtures_ / "evaluation";
    for (const auto& [task, name] : files)
      put("task_files_fuzz", name, std::string{task, '\0'} + read_bytes(folder / name));
    put("task_files_fuzz", "piqa.jsonl",
        "\1\1" + read_bytes(folder / "piqa-labels.lst") + '\0' + read_bytes(folder / "piqa.jsonl"));
  }

  void write_ledgers() const {
    const TemporaryFolder folder;
    const int world_size = 4;
    Context context(DeviceKind::meta);
    const Group world = make_meta_world(1, world_size);
    const auto file = std::make_shared<LedgerFile>(folder / ledger_file_name(1), 1, world_size);
    world.ledger().attach(file);
    file->begin_update(3);
    const Group pair = world.split_by([](int r) { return SplitChoice{r / 2, r}; }, "pair");
    const Tensor data = context.empty({16}, DType::f32);
    for (int i = 0; i < 3; ++i) pair.all_reduce_sum(context, std::vector{data});
    world.send(context, data, 2, 5).wait();
    world.receive(context, data, 0, 6);
    std::vector<uint64_t> words(file->bytes().size() / sizeof(uint64_t));
    std::memcpy(words.data(), file->bytes().data(), words.size() * sizeof(uint64_t));
    put("ledger_fuzz", "running", pack_ledger(words, world_size));
    file->end_run();
    std::memcpy(words.data(), file->bytes().data(), words.size() * sizeof(uint64_t));
    put("ledger_fuzz", "ended", pack_ledger(words, world_size));
  }

  fs::path corpus_;
  fs::path fixtures_;
  fs::path configs_;
};

}  // namespace

}  // namespace normformer

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fputs("usage: make_fuzz_seeds CORPUS FIXTURES CONFIGS\n", stderr);
    return 64;
  }
  normformer::Seeds(argv[1], argv[2], argv[3]).write_all();
  return 0;
}
