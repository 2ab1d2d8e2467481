#include "trained_model.h"

#include <algorithm>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/config/overrides.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run.h"
#include "normformer/training/run_checkpoint.h"

namespace normformer {

namespace {

// Whoever generates needs the last token's logits of a text that grows from nothing: there is little to
// split.
void keep_sequences_whole(RunConfig& config, const std::vector<std::string>& asked) {
  const bool asks = std::find(asked.begin(), asked.end(), "parallel.context") != asked.end();
  if (asks && config.parallel.context > 1) {
    throw ConfigError(
        fmt::format("--set makes parallel.context {}, but texts are generated with parallel.context = 1 only",
                    config.parallel.context));
  }
  config.parallel.context = 1;
}

bool asks_for_layout(const std::vector<std::string>& asked) {
  return std::any_of(asked.begin(), asked.end(),
                     [](const std::string& key) { return key.starts_with("parallel."); });
}

// Weights alone: the masters, rounded to the model's type.
std::vector<TensorPiece> weight_pieces(ModelInstance& model, DType masters, Context& context) {
  std::vector<TensorPiece> pieces;
  for (const Parameter& p : model.store().parameters()) {
    pieces.push_back({p.spec.name,
                      Role::master,
                      p.spec.part,
                      {0, p.numel()},
                      context.empty({p.numel()}, masters, MemoryUse::workspace)});
  }
  return pieces;
}

void read_weights(const CheckpointReader& reader, ModelInstance& model, DType masters, Context& context) {
  const std::vector<TensorPiece> pieces = weight_pieces(model, masters, context);
  reader.read(pieces);
  size_t i = 0;
  for (const Parameter& p : model.store().parameters()) copy(context, pieces[i++].data, p.value);
}

}  // namespace

void TrainedModelOptions::add_to(CLI::App& command) {
  command.add_option("run", run, "A run's folder (its newest checkpoint is taken) or one of its checkpoints")
      ->required();
  command
      .add_option(
          "--set", overrides,
          "Replace keys of the run's configuration: one by section.key=value, those of a TOML file by @FILE")
      ->take_all()
      ->allow_extra_args(false);
}

const BpeTokenizer& TrainedModel::require_tokenizer() const {
  if (!tokenizer) throw DataError("the run's folder has no tokenizer: its corpus came without one");
  return *tokenizer;
}

TrainedModel load_trained_model(const TrainedModelOptions& options, const RankProcess& process) {
  TrainedModel loaded;
  const auto files = make_system_files();
  const RunFolder folder{names_checkpoint(options.run) ? options.run.parent_path().parent_path()
                                                       : options.run};
  loaded.folder = folder;
  run_agreed(process.world, [&] {
    const std::string path = folder.config().string();
    loaded.config = load_run_config(path, options.overrides);
    const std::vector<std::string> asked = overridden_keys(options.overrides);
    loaded.config.parallel.sharding = Sharding::optimizer;  // which leaves weights whole
    loaded.config.parallel.shard_group = 0;                 // nothing is split
    if (options.whole_sequences) keep_sequences_whole(loaded.config, asked);
    // A model is used on any number of ranks, unless the user asks for a layout.
    loaded.config = asks_for_layout(asked) ? resolve_layout(loaded.config, process.world.size())
                                           : nearest_layout(loaded.config, process.world.size());
    if (std::filesystem::exists(folder.tokenizer()))
      loaded.tokenizer = BpeTokenizer::load(folder.tokenizer());
  });
  RankDevice device = make_rank_device(loaded.config, process);
  loaded.context = std::move(device.context);
  const Mesh mesh = make_mesh(device.world, loaded.config.parallel);
  loaded.model = std::make_unique<ModelInstance>(*loaded.context, mesh, loaded.config, false);
  const auto use = [&](const CheckpointReader& reader) {
    read_weights(reader, *loaded.model, master_dtype(loaded.config.train.precision), *loaded.context);
    loaded.checkpoint = reader.folder().filename().string();
  };
  if (names_checkpoint(options.run)) {
    run_agreed(process.world, [&] { use(CheckpointReader(*files, options.run)); });
  } else if (!open_newest_agreed(process.world, *files, folder.checkpoints(), use)) {
    throw AgreedError(ExitCode::bad_data,
                      fmt::format("{} holds no checkpoint", folder.checkpoints().string()));
  }
  loaded.model->prepare();
  return loaded;
}

}  // namespace normformer
