#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/checkpoints/safetensors.h"
#include "normformer/model/model_instance.h"
#include "normformer/sharding/sharded_optimizer.h"
#include "normformer/training/run.h"
#include "normformer/training/run_checkpoint.h"

#include "checkpoint_copies.h"
#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

Rectangle whole(const StoredTensorInfo& tensor) {
  return {{0, tensor.rows}, {0, tensor.columns}, tensor.rows, tensor.columns};
}

Shape shape_of(const StoredTensorInfo& tensor) {
  return tensor.columns == 1 ? Shape{tensor.rows} : Shape{tensor.rows, tensor.columns};
}

int inspect(const std::filesystem::path& where) {
  const auto files = make_system_files();
  const CheckpointReader reader = open_checkpoint(*files, where);
  const CheckpointInfo& info = reader.info();
  fmt::print("{}: after {} updates and {} batches, {} tokens seen, seed {}\n", reader.folder().string(),
             info.update_count, info.batch_index, info.tokens_seen, info.seed);
  for (const auto& [axis, degree] : info.layout) fmt::print("written under {} {}\n", axis, degree);
  int64_t scalars = 0;
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    if (tensor.role != Role::master) continue;
    fmt::print("{:<60} {} {}\n", tensor.name, name_of(tensor.dtype), to_string(shape_of(tensor)));
    scalars += tensor.rows * tensor.columns;
  }
  fmt::print("{} parameters\n", scalars);
  return 0;
}

int verify(const std::filesystem::path& where) {
  const auto files = make_system_files();
  const CheckpointReader reader = open_checkpoint(*files, where);
  const std::vector<std::string> damage = reader.find_damage();
  for (const std::string& sentence : damage) fmt::print("{}\n", sentence);
  if (damage.empty()) fmt::print("{}: every byte is as written\n", reader.folder().string());
  return damage.empty() ? 0 : static_cast<int>(ExitCode::bad_data);
}

int export_weights(const std::filesystem::path& where, const std::filesystem::path& output, DType dtype) {
  const auto files = make_system_files();
  const CheckpointReader reader = open_checkpoint(*files, where);
  std::map<std::string, StoredTensorInfo> masters;
  std::vector<SafetensorsPlan> plan;
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    if (tensor.role != Role::master) continue;
    masters[tensor.name] = tensor;
    plan.push_back({tensor.name, dtype, shape_of(tensor)});
  }
  Context context(DeviceKind::cpu);
  SafetensorsWriter writer(*files, output, plan);
  for (const SafetensorsPlan& next : writer.order()) {
    const StoredTensorInfo& tensor = masters.at(next.name);
    const Rectangle part = whole(tensor);
    const TensorPiece piece{
        tensor.name, Role::master, part, {0, part.numel()}, context.empty({part.numel()}, tensor.dtype)};
    reader.read({&piece, 1});
    writer.write(next.name, piece.data);
  }
  writer.finish();
  fmt::print("wrote {} tensors of {} to {}\n", plan.size(), reader.folder().string(), output.string());
  return 0;
}

// Weights from elsewhere become a run's checkpoint after 0 updates, with the moments of a fresh optimizer.
int import_weights(const std::filesystem::path& input, const std::filesystem::path& config_path,
                   const std::vector<std::string>& overrides) {
  const auto files = make_system_files();
  const SafetensorsReader weights(*files, input);
  RunConfig config = load_run_config(config_path.string(), overrides);
  if (config.model.vocab == 0) config.model.vocab = weights.tensor("decoder.embed_tokens.weight").shape[0];
  config.parallel = {.tensor = 1, .pipeline = 1, .data = 1};
  config = resolve_layout(config, 1);
  Context context(DeviceKind::cpu);
  const Group world = make_self_world();
  ModelInstance model(context, Mesh(world, {}), config, true);
  const ShardedOptimizer optimizer(model.store(), master_dtype(config.train.precision), model.mesh());
  const std::vector<TensorPiece> pieces = checkpoint_pieces(optimizer, true);
  for (const TensorPiece& piece : pieces) {
    if (piece.role == Role::master) weights.read(piece.name, piece.rectangle, piece.data);
  }
  CheckpointInfo info;
  info.config_toml = to_toml(config);
  info.seed = config.train.seed;
  const RunFolder folder{config.checkpoint.folder};
  make_folders(*files, folder.root);
  const SaveResult result =
      save_checkpoint(world, *files, folder.checkpoints(), info, pieces, {.keep = config.checkpoint.keep});
  if (!result) throw IoError(result.reason);
  write_durably(*files, folder.config(), to_toml(config));
  fmt::print("wrote {}; train on with `normformer train {} --resume`\n", result.folder.string(),
             config_path.string());
  return 0;
}

// As train.precision is written; none for "".
std::optional<Precision> parse_precision(const std::string& name) {
  if (name.empty()) return std::nullopt;
  return parse_run_config("", "--precision", {"train.precision=" + name}).train.precision;
}

}  // namespace

void add_checkpoint_command(CLI::App& app, Command& chosen) {
  struct Options {
    std::filesystem::path from;
    std::filesystem::path to;
    std::filesystem::path config;
    std::vector<std::string> overrides;
    DType dtype = DType::f32;
    std::string precision;
  };
  auto options = std::make_shared<Options>();
  CLI::App* group =
      app.add_subcommand("checkpoint", "Look at, verify, compare, rewrite, import and export checkpoints");
  group->require_subcommand(1);
  const auto choose = [&chosen](CLI::App* command, std::function<int()> body) {
    command->callback([body, &chosen] {
      chosen = [body](int*, char***) {
        require_single_process("checkpoint");
        return body();
      };
    });
  };
  const std::string where = "A run's folder (its newest checkpoint is taken) or one of its checkpoints";

  CLI::App* command = group->add_subcommand("inspect", "What a checkpoint holds");
  command->add_option("checkpoint", options->from, where)->required();
  choose(command, [options] { return inspect(options->from); });

  command = group->add_subcommand("verify", "Read every byte and compare it with its checksum");
  command->add_option("checkpoint", options->from, where)->required();
  choose(command, [options] { return verify(options->from); });

  command = group->add_subcommand("diff",
                                  "What differs between two checkpoints, whatever layouts wrote them; "
                                  "ends with 1 where anything does");
  command->add_option("first", options->from, where)->required();
  command->add_option("second", options->to, where)->required();
  choose(command, [options] { return diff_checkpoints(options->from, options->to); });

  command = group->add_subcommand("reshard",
                                  "Write a checkpoint anew, with a data file for each rank: mpirun -n N "
                                  "normformer checkpoint reshard FROM TO");
  command->add_option("checkpoint", options->from, where)->required();
  command->add_option("run", options->to, "The folder of a new run, which receives it")->required();
  command->add_option("--precision", options->precision,
                      "Convert it for this train.precision: fp64, fp32, bf16, ...");
  command->callback([options, &chosen] {
    chosen = [options](int* argc, char*** argv) {
      return run_on_ranks(argc, argv, [&](const RankProcess& process) {
        return reshard_checkpoint(options->from, options->to, parse_precision(options->precision), process);
      });
    };
  });

  command = group->add_subcommand("export", "Write the weights as one safetensors file");
  command->add_option("checkpoint", options->from, where)->required();
  command->add_option("output", options->to, "The safetensors file")->required();
  command->add_option("--dtype", options->dtype, "f32, bf16, f16 or f64")
      ->transform(CLI::CheckedTransformer(std::map<std::string, DType>{
          {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"f64", DType::f64}}));
  choose(command, [options] { return export_weights(options->from, options->to, options->dtype); });

  command = group->add_subcommand("import", "Make a safetensors file the first checkpoint of a run");
  command->add_option("input", options->from, "A safetensors file with fairseq's names")->required();
  command->add_option("config", options->config, "The run's configuration; its checkpoint.folder receives it")
      ->required();
  command->add_option("--set", options->overrides, "Replace one key of the configuration: section.key=value")
      ->take_all()
      ->allow_extra_args(false);
  choose(command, [options] { return import_weights(options->from, options->config, options->overrides); });
}

}  // namespace normformer
