#include "checkpoint_copies.h"

#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "normformer/checkpoints/difference.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/labelled_texts.h"
#include "normformer/mesh/layout.h"
#include "normformer/model/model_instance.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run_checkpoint.h"

namespace normformer {

CheckpointReader open_checkpoint(FileSystem& files, const std::filesystem::path& where) {
  if (names_checkpoint(where)) return CheckpointReader(files, where);
  const std::filesystem::path folder = RunFolder{where}.checkpoints();
  auto reader = open_newest_checkpoint(make_self_world(), files, folder, [](const CheckpointReader&) {});
  if (!reader) throw DataError(fmt::format("{} holds no checkpoint", folder.string()));
  return *reader;
}

RunFolder run_folder_of(const CheckpointReader& reader) {
  return {reader.folder().parent_path().parent_path()};
}

int diff_checkpoints(const std::filesystem::path& a, const std::filesystem::path& b) {
  const auto files = make_system_files();
  const CheckpointReader first = open_checkpoint(*files, a);
  const CheckpointReader second = open_checkpoint(*files, b);
  const std::vector<std::string> infos = compare_infos(first.info(), second.info());
  for (const std::string& sentence : infos) fmt::print("{}\n", sentence);
  const std::vector<TensorDifference> tensors = compare_tensors(first, second);
  for (const TensorDifference& t : tensors) {
    const std::string what =
        !t.shape_fault.empty()
            ? t.shape_fault
            : fmt::format(
                  "{} of {} elements differ, by at most {:.3g}; the norm of the difference is {:.3g} of the "
                  "first's",
                  t.different, t.elements, t.largest, t.relative);
    fmt::print("{} ({}): {}\n", t.name, name_of(t.role), what);
  }
  fmt::print("{} of {} tensors differ\n", tensors.size(), first.tensors().size());
  return infos.empty() && tensors.empty() ? 0 : 1;
}

namespace {

DType type_under(const StoredTensorInfo& tensor, std::optional<Precision> precision) {
  if (!precision) return tensor.dtype;
  switch (tensor.role) {
    case Role::parameter:
      return model_dtype(*precision);
    case Role::master:
      return master_dtype(*precision);
    case Role::moment1:
    case Role::moment2:
      return accumulator_of(model_dtype(*precision));
  }
  return tensor.dtype;
}

// This rank's even part of every tensor, in the types that are wanted.
std::vector<TensorPiece> read_parts(Context& context, const CheckpointReader& reader,
                                    std::optional<Precision> precision, const Group& world) {
  std::vector<TensorPiece> pieces;
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    const Rectangle whole{{0, tensor.rows}, {0, tensor.columns}, tensor.rows, tensor.columns};
    const Range part = even_part(whole.numel(), world.size(), world.rank());
    TensorPiece piece{tensor.name, tensor.role, whole, part, context.empty({part.size()}, tensor.dtype)};
    reader.read({&piece, 1});
    const DType wanted = type_under(tensor, precision);
    if (wanted != tensor.dtype) {
      const Tensor converted = context.empty({part.size()}, wanted);
      copy(context, piece.data, converted);
      piece.data = converted;
    }
    pieces.push_back(std::move(piece));
  }
  return pieces;
}

// As of the run in the new folder. A loss scale belongs to its precision.
CheckpointInfo info_for(CheckpointInfo info, const RunFolder& folder, std::optional<Precision> precision) {
  RunConfig config = parse_run_config(info.config_toml, "the checkpoint's configuration", {});
  config.checkpoint.folder = folder.root.string();
  if (precision && *precision != config.train.precision) {
    const TrainConfig defaults;
    config.train.precision = *precision;
    if (!scales_loss(*precision)) {
      config.train.loss_scale_init = defaults.loss_scale_init;
      config.train.loss_scale_window = defaults.loss_scale_window;
      config.train.loss_scale_min = defaults.loss_scale_min;
    }
    info.loss_scale = 0.0;
    info.clean_updates = 0;
  }
  info.run_id = folder.root.filename().string();
  info.config_toml = to_toml(config);
  return info;
}

// What the weights' user needs to read and to name what the model takes and tells.
struct Vocabulary {
  std::optional<BpeTokenizer> tokenizer;
  std::vector<std::string> classes;
};

Vocabulary read_vocabulary(FileSystem& files, const RunFolder& folder) {
  Vocabulary vocabulary;
  if (files.exists(folder.tokenizer())) vocabulary.tokenizer = BpeTokenizer::load(folder.tokenizer());
  if (files.exists(folder.classes())) vocabulary.classes = read_class_names(folder.classes());
  return vocabulary;
}

// The configuration last: its write also makes the names of the others durable.
void prepare_folder(FileSystem& files, const RunFolder& folder, const Vocabulary& vocabulary,
                    const std::string& config) {
  make_folders(files, folder.root);
  if (vocabulary.tokenizer) vocabulary.tokenizer->save(folder.tokenizer());
  if (!vocabulary.classes.empty()) write_class_names(folder.classes(), vocabulary.classes);
  write_durably(files, folder.config(), config);
}

}  // namespace

int reshard_checkpoint(const std::filesystem::path& from, const std::filesystem::path& to,
                       std::optional<Precision> precision, const RankProcess& process) {
  const Group& world = process.world;
  const auto files = make_system_files();
  const RunFolder folder{to};
  Context context(DeviceKind::cpu);
  std::vector<TensorPiece> pieces;
  CheckpointInfo info;
  Vocabulary vocabulary;
  run_agreed(world, [&] {
    if (world.rank() == 0 && !list_checkpoints(*files, folder.checkpoints()).empty())
      throw ConfigError(fmt::format("{} already holds checkpoints: name another folder", to.string()));
    const CheckpointReader reader = open_checkpoint(*files, from);
    info = info_for(reader.info(), folder, precision);
    vocabulary = read_vocabulary(*files, run_folder_of(reader));
    pieces = read_parts(context, reader, precision, world);
  });
  // A checkpoint that is published has all that it needs beside it.
  run_agreed(world, [&] {
    if (world.rank() == 0) prepare_folder(*files, folder, vocabulary, info.config_toml);
  });
  const SaveResult result =
      save_checkpoint(world, *files, folder.checkpoints(), info, pieces, {.staging_bytes = 1});
  run_agreed(world, [&] {
    if (!result) throw IoError(result.reason);
    if (world.rank() != 0) return;
    fmt::print("wrote {} in {} files; train on with `normformer train {} --resume`\n", result.folder.string(),
               world.size(), folder.config().string());
  });
  return 0;
}

}  // namespace normformer
