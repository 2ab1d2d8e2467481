#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/tensor/dtype.h"

namespace normformer {

/// Which class of Hugging Face's transformers reads a folder.
enum class HuggingFaceKind {
  gpt2,        ///< their GPT2LMHeadModel
  normformer,  ///< ours, which the folder brings along as Python files
};

/// GPT-2 for a causal Pre-LN baseline with learned positions and embeddings as they are, else NormFormer.
HuggingFaceKind huggingface_kind(const ModelConfig& model);

/// Where a folder for transformers keeps one of a checkpoint's tensors.
struct HuggingFacePlace {
  std::string name;         ///< of the tensor in model.safetensors
  int64_t part = 0;         ///< which of `parts` it is there
  int64_t parts = 1;        ///< tensors of one shape, one after another along their output features
  bool transposed = false;  ///< [in, out], as GPT-2's Conv1D has it
  bool operator==(const HuggingFacePlace&) const = default;
};

/// The place of the tensor `name` of a checkpoint; none where a GPT-2 has no such tensor.
std::optional<HuggingFacePlace> huggingface_place(HuggingFaceKind kind, std::string_view name);

/// config.json of a causal language model whose weights are stored as `dtype`. `end_of_text` is the
/// tokenizer's, which begins and ends documents. `model` has a vocabulary.
std::string make_huggingface_config(const ModelConfig& model, DType dtype,
                                    std::optional<int32_t> end_of_text);

/// What a config.json tells of a model.
struct HuggingFaceModel {
  HuggingFaceKind kind = HuggingFaceKind::gpt2;
  ModelConfig model;
};

/// Reads the text of a config.json. Throws DataError that begins with `file` and names the key where it is no
/// JSON object, of another type of model, lacks a size, or has a value that this program's models cannot
/// have.
HuggingFaceModel parse_huggingface_config(std::string_view json, const std::string& file);

/// The longest config.json that is read, in bytes.
inline constexpr int64_t kMaxHuggingFaceConfig = int64_t{1} << 20;

/// A text file that a folder of ours brings along.
struct HuggingFaceFile {
  std::string_view name;
  std::string_view content;
};

/// configuration_normformer.py and modeling_normformer.py, which transformers runs with trust_remote_code.
std::vector<HuggingFaceFile> huggingface_python_files();

}  // namespace normformer
