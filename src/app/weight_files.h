#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "normformer/config/run_config.h"
#include "normformer/tensor/dtype.h"

namespace normformer {

/// What `normformer checkpoint export` writes.
enum class ExportFormat {
  safetensors,  ///< one file with fairseq's names
  huggingface,  ///< a folder for transformers
};

/// `normformer checkpoint export`: the weights of a run or checkpoint as `dtype` to `output`, which appears
/// complete or not at all. ConfigError where `output` is a folder that exists, or the model none that
/// transformers is given a class for. Returns 0.
int export_weights(const std::filesystem::path& where, const std::filesystem::path& output, DType dtype,
                   ExportFormat format);

/// What `normformer checkpoint import` is told.
struct ImportOptions {
  std::filesystem::path input;         ///< a safetensors file, or a folder of transformers
  std::filesystem::path config;        ///< the run's configuration; "": from the folder
  std::filesystem::path output;        ///< the run's folder; "": the configuration's
  std::vector<std::string> overrides;  ///< "section.key=value"
};

/// `normformer checkpoint import`: weights from elsewhere become a run's checkpoint after 0 updates, with the
/// moments of a fresh optimizer; a folder's tokenizer becomes the run's. ConfigError where configuration and
/// weights are of two models, or the run has checkpoints. Returns 0.
int import_weights(const ImportOptions& options);

}  // namespace normformer
