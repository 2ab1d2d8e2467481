#include <cstdio>
#include <map>
#include <optional>

#include <nlohmann/json.hpp>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/checkpoints/huggingface.h"
#include "normformer/checkpoints/safetensors.h"
#include "normformer/data/bpe_tokenizer.h"

#include "checkpoint_copies.h"
#include "transpose.h"
#include "weight_files.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// A tensor of the file that is written, and those of the checkpoint that it is made of, in their order.
struct Composition {
  std::vector<StoredTensorInfo> parts;
  bool transposed = false;

  int64_t rows() const { return static_cast<int64_t>(parts.size()) * parts.front().rows; }
  int64_t columns() const { return parts.front().columns; }
  Shape shape() const {
    if (transposed) return {columns(), rows()};
    return columns() == 1 ? Shape{rows()} : Shape{rows(), columns()};
  }
};

std::map<std::string, Composition> compose(const CheckpointReader& reader, HuggingFaceKind kind) {
  std::map<std::string, Composition> tensors;
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    if (tensor.role != Role::master) continue;
    const std::optional<HuggingFacePlace> place = huggingface_place(kind, tensor.name);
    if (!place) {
      throw DataError(
          fmt::format("{} has a tensor '{}', which a GPT-2 has not", reader.folder().string(), tensor.name));
    }
    Composition& made = tensors[place->name];
    made.parts.resize(static_cast<size_t>(place->parts));
    made.parts[static_cast<size_t>(place->part)] = tensor;
    made.transposed = place->transposed;
  }
  return tensors;
}

Tensor read_whole(Context& context, const CheckpointReader& reader, const StoredTensorInfo& tensor) {
  const Rectangle whole{{0, tensor.rows}, {0, tensor.columns}, tensor.rows, tensor.columns};
  const TensorPiece piece{
      tensor.name, Role::master, whole, {0, whole.numel()}, context.empty({whole.numel()}, tensor.dtype)};
  reader.read({&piece, 1});
  return piece.data;
}

Tensor read_composed(Context& context, const CheckpointReader& reader, const Composition& made) {
  if (made.parts.size() == 1 && !made.transposed) return read_whole(context, reader, made.parts.front());
  const Tensor all = context.empty({made.rows() * made.columns()}, made.parts.front().dtype);
  int64_t first_row = 0;
  for (const StoredTensorInfo& part : made.parts) {
    const Tensor values = read_whole(context, reader, part);
    if (made.transposed) {
      transpose(values, part.rows, part.columns, all, made.rows(), first_row);
    } else {
      copy(context, values, all.flat(first_row * part.columns, values.numel()));
    }
    first_row += part.rows;
  }
  return all;
}

// Every master of the checkpoint into one file; how many tensors that made.
size_t write_tensors(FileSystem& files, const CheckpointReader& reader, HuggingFaceKind kind,
                     const fs::path& output, DType dtype) {
  const std::map<std::string, Composition> tensors = compose(reader, kind);
  std::vector<SafetensorsPlan> plan;
  for (const auto& [name, made] : tensors) plan.push_back({name, dtype, made.shape()});
  Context context(DeviceKind::cpu);
  SafetensorsWriter writer(files, output, plan);
  for (const SafetensorsPlan& next : writer.order()) {
    writer.write(next.name, read_composed(context, reader, tensors.at(next.name)));
  }
  writer.finish();
  return plan.size();
}

RunConfig config_of(const CheckpointReader& reader) {
  RunConfig config = parse_run_config(reader.info().config_toml, "the checkpoint's configuration", {});
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    if (tensor.name == "decoder.embed_tokens.weight") config.model.vocab = tensor.rows;
  }
  if (config.model.head != OutputHead::language) {
    throw ConfigError(fmt::format(
        "--format huggingface is for models with model.head = \"language\", and that of {} is {}; "
        "--format safetensors writes any",
        reader.folder().string(), toml_value(config, "model.head")));
  }
  return config;
}

fs::path tokenizer_of(const CheckpointReader& reader) { return run_folder_of(reader).tokenizer(); }

// What tells transformers of the special tokens; the vocabulary and its merges stand beside it.
void write_tokenizer(FileSystem& files, const BpeTokenizer& tokenizer, int64_t length,
                     const fs::path& folder) {
  tokenizer.save(folder);
  Json special;
  const auto end = tokenizer.end_of_text();
  for (const char* key : {"bos_token", "eos_token", "unk_token"}) {
    special[key] = end ? Json(tokenizer.token(*end)) : Json();
  }
  Json others = Json::array();
  for (const int32_t id : tokenizer.special_tokens()) {
    if (id != end) others.push_back(tokenizer.token(id));
  }
  if (!others.empty()) special["additional_special_tokens"] = others;
  Json config = special;
  config["tokenizer_class"] = "GPT2Tokenizer";
  config["add_prefix_space"] = false;
  config["model_max_length"] = length;
  write_durably(files, folder / "special_tokens_map.json", special.dump(2) + "\n");
  write_durably(files, folder / "tokenizer_config.json", config.dump(2) + "\n");
}

std::string generation_config(std::optional<int32_t> end_of_text) {
  Json json;
  json["_from_model_config"] = true;
  if (end_of_text) json["bos_token_id"] = json["eos_token_id"] = *end_of_text;
  return json.dump(2) + "\n";
}

size_t write_folder(FileSystem& files, const CheckpointReader& reader, const fs::path& folder, DType dtype,
                    bool with_tokenizer) {
  const RunConfig config = config_of(reader);
  const HuggingFaceKind kind = huggingface_kind(config.model);
  std::optional<int32_t> end;
  if (with_tokenizer) {
    const BpeTokenizer tokenizer = BpeTokenizer::load(tokenizer_of(reader));
    end = tokenizer.end_of_text();
    write_tokenizer(files, tokenizer, config.model.length, folder);
  }
  write_durably(files, folder / "config.json", make_huggingface_config(config.model, dtype, end));
  write_durably(files, folder / "generation_config.json", generation_config(end));
  if (kind == HuggingFaceKind::normformer) {
    for (const HuggingFaceFile& file : huggingface_python_files())
      write_durably(files, folder / file.name, file.content);
  }
  return write_tensors(files, reader, kind, folder / "model.safetensors", dtype);
}

// The folder is written under another name beside its own.
size_t export_folder(FileSystem& files, const CheckpointReader& reader, fs::path output, DType dtype,
                     bool with_tokenizer) {
  if (!output.has_filename()) output = output.parent_path();
  if (files.exists(output)) {
    throw ConfigError(fmt::format("{} exists already: name a new folder", output.string()));
  }
  const fs::path parent = output.has_parent_path() ? output.parent_path() : fs::path(".");
  const fs::path temporary = parent / (".tmp-" + output.filename().string());
  make_folders(files, parent);
  if (files.exists(temporary)) remove_folder_and_files(files, temporary);
  files.make_folder(temporary);
  try {
    const size_t tensors = write_folder(files, reader, temporary, dtype, with_tokenizer);
    files.sync_folder(temporary);
    files.rename(temporary, output);
    files.sync_folder(parent);
    return tensors;
  } catch (...) {
    if (files.exists(temporary)) remove_folder_and_files(files, temporary);
    throw;
  }
}

}  // namespace

int export_weights(const fs::path& where, const fs::path& output, DType dtype, ExportFormat format) {
  const auto files = make_system_files();
  const CheckpointReader reader = open_checkpoint(*files, where);
  size_t tensors = 0;
  std::string remark;
  if (format == ExportFormat::safetensors) {
    tensors = write_tensors(*files, reader, HuggingFaceKind::normformer, output, dtype);
  } else {
    const bool with_tokenizer = files->exists(tokenizer_of(reader));
    tensors = export_folder(*files, reader, output, dtype, with_tokenizer);
    if (!with_tokenizer) remark = ", without a tokenizer, as the run's folder has none";
  }
  fmt::print("wrote {} tensors of {} to {}{}\n", tensors, reader.folder().string(), output.string(), remark);
  return 0;
}

}  // namespace normformer
