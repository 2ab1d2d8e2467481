#include "normformer/training/run_checkpoint.h"

#include <cstdlib>
#include <vector>

#include <fmt/ranges.h>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/log.h"
#include "normformer/training/agreement.h"

namespace normformer {

namespace {

Role role_of(StateRole role) {
  switch (role) {
    case StateRole::master:
      return Role::master;
    case StateRole::moment1:
      return Role::moment1;
    case StateRole::moment2:
      return Role::moment2;
  }
  return Role::master;
}

// A run may go on with other settings, said aloud where they change what it computes, but not with another
// model.
void compare_configurations(const RunConfig& saved, const RunConfig& now, const std::string& folder) {
  std::vector<std::string> refused;
  for (const ConfigKey& key : config_keys()) {
    const std::string before = toml_value(saved, key.name);
    const std::string value = toml_value(now, key.name);
    if (before == value || key.on_resume == ResumePolicy::irrelevant) continue;
    const std::string change = fmt::format("{} was {} and is {} now", key.name, before, value);
    if (key.on_resume == ResumePolicy::must_equal)
      refused.push_back(change);
    else
      log_root(LogLevel::warning, "resuming with another setting: {}", change);
  }
  if (refused.empty()) return;
  throw DataError(fmt::format("{} is of another run: {}; change it back or choose another checkpoint.folder",
                              folder, fmt::join(refused, ", ")));
}

SaveOptions save_options(const CheckpointConfig& config) {
  const char* const attempt = std::getenv("NORMFORMER_ATTEMPT");
  return {.keep = config.keep,
          .keep_every = config.keep_every,
          .staging_bytes = static_cast<int64_t>(config.staging_mib * 1024 * 1024),
          .attempt = attempt == nullptr ? 0 : std::atoll(attempt)};
}

TrainingCounters counters_of(const CheckpointInfo& info) {
  return {.batch_index = info.batch_index,
          .updates = info.update_count,
          .tokens = info.tokens_seen,
          .skipped_in_a_row = info.skipped_in_a_row,
          .loss_scale = {info.loss_scale, info.clean_updates, info.overflows},
          .recent = {info.recent_losses, info.recent_gradient_norms},
          .trend = {info.trend_losses, info.lowest_loss}};
}

}  // namespace

std::vector<TensorPiece> checkpoint_pieces(const ShardedOptimizer& optimizer, bool owned_only) {
  std::vector<TensorPiece> pieces;
  for (const StatePiece& state : optimizer.state()) {
    const ParameterSpec& spec = state.piece.parameter->spec;
    if (owned_only && !optimizer.owns(*state.piece.parameter)) continue;
    pieces.push_back({spec.name, role_of(state.role), spec.part, state.piece.range, state.piece.values});
  }
  return pieces;
}

int64_t staging_bytes(const CheckpointConfig& config, const ShardedOptimizer& optimizer) {
  int64_t saved = 0;
  for (const TensorPiece& piece : checkpoint_pieces(optimizer, true)) saved += piece.data.nbytes();
  return save_options(config).staging_for(saved);
}

bool names_checkpoint(const std::filesystem::path& path) {
  return path.filename().string().starts_with("step-");
}

std::optional<CheckpointReader> open_newest_agreed(const Group& world, FileSystem& files,
                                                   const std::filesystem::path& folder,
                                                   const std::function<void(const CheckpointReader&)>& use,
                                                   bool older_too) {
  try {
    return open_newest_checkpoint(world, files, folder, use, older_too);
  } catch (const CommError&) {
    throw;
  } catch (const LogicError&) {
    throw;
  } catch (const Error& e) {
    throw AgreedError(e.exit_code(), e.what());
  }
}

RunCheckpoints::RunCheckpoints(const Group& world, std::filesystem::path folder, const RunConfig& config,
                               std::string tokenizer_hash, uint64_t data_fingerprint)
    : files_(make_system_files()),
      folder_(std::move(folder)),
      config_(config),
      tokenizer_hash_(std::move(tokenizer_hash)),
      data_fingerprint_(data_fingerprint),
      writer_(world, *files_, folder_, save_options(config.checkpoint)) {}

bool RunCheckpoints::any() const { return !list_checkpoints(*files_, folder_).empty(); }

std::optional<SaveResult> RunCheckpoints::begin_save(Trainer& trainer,
                                                     const std::map<std::string, double>& metrics) {
  const TrainingCounters& counters = trainer.counters();
  const Mesh& mesh = trainer.model().mesh();
  const CheckpointInfo info{.run_id = folder_.parent_path().filename().string(),
                            .update_count = counters.updates,
                            .batch_index = counters.batch_index,
                            .skipped_in_a_row = counters.skipped_in_a_row,
                            .tokens_seen = counters.tokens,
                            .consumed_samples = counters.batch_index * config_.train.global_batch,
                            .seed = config_.train.seed,
                            .config_toml = to_toml(config_),
                            .tokenizer_hash = tokenizer_hash_,
                            .metrics = metrics,
                            .layout = {{"tensor", mesh.tensor().size()},
                                       {"context", mesh.context().size()},
                                       {"pipeline", mesh.pipeline().size()},
                                       {"data", mesh.data().size()}},
                            .loss_scale = counters.loss_scale.value,
                            .clean_updates = counters.loss_scale.clean_updates,
                            .overflows = counters.loss_scale.overflows,
                            .recent_losses = counters.recent.losses,
                            .recent_gradient_norms = counters.recent.gradient_norms,
                            .trend_losses = counters.trend.newest,
                            .lowest_loss = counters.trend.lowest,
                            .data_fingerprint = data_fingerprint_};
  return writer_.begin(info, checkpoint_pieces(trainer.optimizer(), true));
}

bool RunCheckpoints::load_newest(Trainer& trainer) {
  const std::vector<TensorPiece> pieces = checkpoint_pieces(trainer.optimizer(), false);
  const auto use = [&](const CheckpointReader& reader) {
    const CheckpointInfo& info = reader.info();
    const std::string name = reader.folder().string();
    compare_configurations(parse_run_config(info.config_toml, name, {}), config_, name);
    // Imported weights come without a tokenizer.
    if (!info.tokenizer_hash.empty() && info.tokenizer_hash != tokenizer_hash_) {
      throw DataError(fmt::format("{} was trained with another tokenizer than the corpus now has", name));
    }
    if (info.data_fingerprint != 0 && info.data_fingerprint != data_fingerprint_) {
      log_root(LogLevel::warning,
               "{} was trained on other data, or on the same in another order: it goes on with batch {} of "
               "these",
               name, info.batch_index);
    }
    reader.read(pieces);
  };
  const auto reader = open_newest_agreed(trainer.model().mesh().world(), *files_, folder_, use,
                                         config_.checkpoint.on_damage == DamagePolicy::older);
  if (!reader) return false;
  trainer.set_counters(counters_of(reader->info()));
  trainer.weights_changed();
  return true;
}

}  // namespace normformer
