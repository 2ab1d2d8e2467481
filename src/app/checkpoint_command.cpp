#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"

#include "checkpoint_copies.h"
#include "commands.h"
#include "ranks.h"
#include "weight_files.h"

namespace normformer {

namespace {

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
    ImportOptions import;
    DType dtype = DType::f32;
    ExportFormat format = ExportFormat::safetensors;
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

  command = group->add_subcommand("export", "Write the weights as one safetensors file, or for transformers");
  command->add_option("checkpoint", options->from, where)->required();
  command->add_option("output,--output", options->to, "The safetensors file, or a new folder")->required();
  command
      ->add_option("--format", options->format,
                   "safetensors (fairseq's names), or huggingface: a folder for transformers")
      ->transform(CLI::CheckedTransformer(std::map<std::string, ExportFormat>{
          {"safetensors", ExportFormat::safetensors}, {"huggingface", ExportFormat::huggingface}}));
  command->add_option("--dtype", options->dtype, "f32, bf16, f16 or f64")
      ->transform(CLI::CheckedTransformer(std::map<std::string, DType>{
          {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"f64", DType::f64}}));
  choose(command,
         [options] { return export_weights(options->from, options->to, options->dtype, options->format); });

  command = group->add_subcommand("import", "Make weights from elsewhere the first checkpoint of a run");
  command
      ->add_option(
          "input", options->import.input,
          "A safetensors file with fairseq's names, or a folder of transformers: GPT-2 or NormFormer")
      ->required();
  command->add_option("config,--config", options->import.config,
                      "The run's configuration; a folder of transformers needs none");
  command->add_option("--output", options->import.output,
                      "The run's folder; without, the configuration's checkpoint.folder");
  command
      ->add_option(
          "--set", options->import.overrides,
          "Replace keys of the configuration: one by section.key=value, those of a TOML file by @FILE")
      ->take_all()
      ->allow_extra_args(false);
  choose(command, [options] { return import_weights(options->import); });
}

}  // namespace normformer
