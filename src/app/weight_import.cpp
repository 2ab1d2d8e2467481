#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/checkpoints/huggingface.h"
#include "normformer/checkpoints/safetensors.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/mesh/layout.h"
#include "normformer/model/model_instance.h"
#include "normformer/sharding/sharded_optimizer.h"
#include "normformer/training/run.h"
#include "normformer/training/run_checkpoint.h"

#include "transpose.h"
#include "weight_files.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kGpt2Prefix = "transformer.";

// The safetensors files of a folder, or the one that was named.
std::vector<fs::path> weight_files(FileSystem& files, const fs::path& input, bool is_folder) {
  if (!is_folder) return {input};
  std::vector<fs::path> found;
  bool pickled = false;
  for (const std::string& name : files.list(input)) {
    const bool part = name == "model.safetensors" || name.starts_with("model-");
    if (part && name.ends_with(".safetensors")) found.push_back(input / name);
    pickled = pickled || (name.starts_with("pytorch_model") && name.ends_with(".bin"));
  }
  if (found.empty() && pickled) {
    throw DataError(fmt::format(
        "{} has its weights in pytorch_model.bin, a format that can run code when it is read: convert it in "
        "Python with AutoModelForCausalLM.from_pretrained(\"{}\").save_pretrained(\"NEW\", "
        "safe_serialization=True)",
        input.string(), input.string()));
  }
  if (found.empty()) throw DataError(fmt::format("{} has no model.safetensors", input.string()));
  return found;
}

// Weights from elsewhere, by this program's names.
class ForeignWeights {
 public:
  ForeignWeights(FileSystem& files, const fs::path& input, bool is_folder, HuggingFaceKind kind)
      : kind_(kind) {
    for (const fs::path& path : weight_files(files, input, is_folder)) readers_.emplace_back(path);
    // OpenAI's own were saved from the model without its head.
    bare_ = kind == HuggingFaceKind::gpt2 && find("transformer.wte.weight") == nullptr;
  }

  const SafetensorsEntry& embedding() const {
    const std::string name = written(place_of("decoder.embed_tokens.weight"));
    return reader_of(name).tensor(name);
  }

  /// DataError where there is no such tensor of [rows, columns].
  void expect(std::string_view ours, int64_t rows, int64_t columns) const {
    const HuggingFacePlace place = place_of(ours);
    const std::string name = written(place);
    const int64_t all = place.parts * rows;
    reader_of(name).expect(name, place.transposed ? columns : all, place.transposed ? all : columns);
  }

  /// Fills a piece that is a whole tensor.
  void read(Context& context, const TensorPiece& piece) {
    const HuggingFacePlace place = place_of(piece.name);
    const std::string name = written(place);
    used_.insert(name);
    const int64_t rows = piece.rectangle.global_rows;
    const int64_t columns = piece.rectangle.global_columns;
    const Range part{place.part * rows, (place.part + 1) * rows};
    const int64_t all = place.parts * rows;
    if (!place.transposed) {
      reader_of(name).read(name, {part, {0, columns}, all, columns}, piece.data);
      return;
    }
    const Tensor values = context.empty({rows * columns}, piece.data.dtype());
    reader_of(name).read(name, {{0, columns}, part, columns, all}, values);
    transpose(values, columns, rows, piece.data, columns, 0);
  }

  /// DataError where a tensor was not asked for: it would be left out of the model.
  void check_all_used() const {
    for (const SafetensorsReader& reader : readers_) {
      for (const SafetensorsEntry& entry : reader.tensors()) {
        if (used_.contains(entry.name) || is_no_weight(entry.name)) continue;
        throw DataError(fmt::format("{} has a tensor '{}', which the model has not: it is another model",
                                    reader.path().string(), entry.name));
      }
    }
  }

 private:
  // Causal masks, which GPT-2 saved as buffers, and its output matrix, which is the tied embedding.
  bool is_no_weight(std::string_view name) const {
    return kind_ == HuggingFaceKind::gpt2 &&
           (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name == "lm_head.weight");
  }

  HuggingFacePlace place_of(std::string_view ours) const {
    const std::optional<HuggingFacePlace> place = huggingface_place(kind_, ours);
    NF_CHECK(place, "a GPT-2 has no '{}'", ours);
    return *place;
  }

  std::string written(const HuggingFacePlace& place) const {
    return bare_ ? place.name.substr(kGpt2Prefix.size()) : place.name;
  }

  const SafetensorsReader* find(std::string_view name) const {
    const auto has = [&](const SafetensorsReader& reader) { return reader.contains(name); };
    const auto found = std::find_if(readers_.begin(), readers_.end(), has);
    return found == readers_.end() ? nullptr : &*found;
  }

  const SafetensorsReader& reader_of(std::string_view name) const {
    const SafetensorsReader* found = find(name);
    return found == nullptr ? readers_.front() : *found;
  }

  HuggingFaceKind kind_;
  bool bare_ = false;
  std::vector<SafetensorsReader> readers_;
  std::set<std::string, std::less<>> used_;
};

bool decides_function(const ConfigKey& key) {
  return key.name.starts_with("model.") && key.on_resume == ResumePolicy::must_equal &&
         key.name != "model.init";
}

// What the configuration leaves open comes from the folder; what both say must be the same.
void match_model(RunConfig& config, const ModelConfig& model, const fs::path& config_path,
                 const std::string& folder_config) {
  if (config.model.vocab == 0) config.model.vocab = model.vocab;
  if (config.model.ffn == 0) config.model.ffn = 4 * config.model.width;
  RunConfig theirs;
  theirs.model = model;
  for (const ConfigKey& key : config_keys()) {
    if (!decides_function(key) || toml_value(config, key.name) == toml_value(theirs, key.name)) continue;
    throw ConfigError(fmt::format("{}: {} = {}, and the model of {} has {}: write {} = {}",
                                  config_path.string(), key.name, toml_value(config, key.name), folder_config,
                                  toml_value(theirs, key.name), key.name, toml_value(theirs, key.name)));
  }
}

RunConfig config_for(const ImportOptions& options, const std::optional<HuggingFaceModel>& folder) {
  if (!folder && options.config.empty()) {
    throw ConfigError(
        fmt::format("{} tells no model's shape: name a configuration, too", options.input.string()));
  }
  if (options.config.empty() && options.output.empty())
    throw ConfigError("checkpoint import without a configuration needs --output, the folder of the new run");
  RunConfig config;
  if (options.config.empty()) {
    config.model = folder->model;
    config = parse_run_config(to_toml(config), (options.input / "config.json").string(), options.overrides);
  } else {
    config = load_run_config(options.config.string(), options.overrides);
  }
  if (!options.output.empty()) config.checkpoint.folder = options.output.string();
  if (folder)
    match_model(config, folder->model, options.config.empty() ? "--set" : options.config,
                (options.input / "config.json").string());
  config.parallel = {.tensor = 1, .pipeline = 1, .data = 1};
  return config;
}

bool has_tokenizer(const fs::path& folder) {
  return fs::exists(folder / "tokenizer.json") || fs::exists(folder / "vocab.json") ||
         fs::exists(folder / "encoder.json");
}

std::optional<BpeTokenizer> tokenizer_of(const fs::path& folder, int64_t vocab) {
  if (!has_tokenizer(folder)) return std::nullopt;
  BpeTokenizer tokenizer = BpeTokenizer::load(folder);
  if (tokenizer.vocab_size() > vocab) {
    throw DataError(fmt::format("the tokenizer of {} has {} tokens, and its model {} rows for them",
                                folder.string(), tokenizer.vocab_size(), vocab));
  }
  return tokenizer;
}

// Before anything is allocated that a configuration claims and the file has not.
void check_sizes(const ForeignWeights& weights, const ModelConfig& model) {
  weights.expect("decoder.embed_tokens.weight", model.vocab, model.width);
  if (model.positions == Positions::learned)
    weights.expect("decoder.embed_positions.weight", model.length, model.width);
  weights.expect(fmt::format("decoder.layers.{}.fc1.weight", model.layers - 1), model.ffn, model.width);
}

SaveResult save_weights(FileSystem& files, const RunConfig& config, ForeignWeights& weights,
                        bool all_of_them) {
  Context context(DeviceKind::cpu);
  const Group world = make_self_world();
  ModelInstance model(context, Mesh(world, {}), config, true);
  const ShardedOptimizer optimizer(model.store(), master_dtype(config.train.precision), model.mesh());
  const std::vector<TensorPiece> pieces = checkpoint_pieces(optimizer, true);
  for (const TensorPiece& piece : pieces) {
    if (piece.role == Role::master) weights.read(context, piece);
  }
  if (all_of_them) weights.check_all_used();
  CheckpointInfo info;
  info.config_toml = to_toml(config);
  info.seed = config.train.seed;
  const RunFolder folder{config.checkpoint.folder};
  make_folders(files, folder.root);
  const SaveResult result =
      save_checkpoint(world, files, folder.checkpoints(), info, pieces, {.keep = config.checkpoint.keep});
  if (!result) throw IoError(result.reason);
  return result;
}

}  // namespace

int import_weights(const ImportOptions& options) {
  const auto files = make_system_files();
  const bool is_folder = fs::is_directory(options.input);
  std::optional<HuggingFaceModel> described;
  if (is_folder) {
    const fs::path path = options.input / "config.json";
    described = parse_huggingface_config(read_whole_file(*files, path, kMaxHuggingFaceConfig), path.string());
  }
  RunConfig config = config_for(options, described);
  const RunFolder folder{config.checkpoint.folder};
  if (!list_checkpoints(*files, folder.checkpoints()).empty()) {
    throw ConfigError(fmt::format("{} already holds checkpoints: name another folder", folder.root.string()));
  }
  ForeignWeights weights(*files, options.input, is_folder,
                         described ? described->kind : HuggingFaceKind::normformer);
  if (config.model.vocab == 0) config.model.vocab = weights.embedding().shape[0];
  config = resolve_layout(config, 1);
  check_sizes(weights, config.model);
  const std::optional<BpeTokenizer> tokenizer =
      is_folder ? tokenizer_of(options.input, config.model.vocab) : std::nullopt;
  const SaveResult result = save_weights(*files, config, weights, is_folder);
  write_durably(*files, folder.config(), to_toml(config));
  if (tokenizer) tokenizer->save(folder.tokenizer());
  const fs::path written = options.config.empty() ? folder.config() : options.config;
  fmt::print("wrote {}; train on with `normformer train {} --resume`\n", result.folder.string(),
             written.string());
  return 0;
}

}  // namespace normformer
