#include "normformer/training/starting_weights.h"

#include <algorithm>
#include <map>
#include <set>

#include <fmt/ranges.h>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/training/agreement.h"
#include "normformer/training/run.h"
#include "normformer/training/run_checkpoint.h"

namespace normformer {

namespace {

using Masters = std::map<std::string, StoredTensorInfo>;

Masters masters_of(const CheckpointReader& reader) {
  Masters masters;
  for (const StoredTensorInfo& tensor : reader.tensors()) {
    if (tensor.role == Role::master) masters[tensor.name] = tensor;
  }
  return masters;
}

std::string shape_text(int64_t rows, int64_t columns) {
  return columns == 1 ? fmt::format("[{}]", rows) : fmt::format("[{}, {}]", rows, columns);
}

void require_same_shape(const ParameterSpec& spec, const StoredTensorInfo& stored,
                        const std::string& folder) {
  const int64_t rows = spec.logical_shape[0];
  const int64_t columns = spec.logical_shape.rank() == 1 ? 1 : spec.logical_shape[1];
  if (rows == stored.rows && columns == stored.columns) return;
  throw DataError(fmt::format(
      "{} has {} as {}, but this run's model as {}: give the model the same sizes, or choose another "
      "train.init_from",
      folder, spec.name, shape_text(stored.rows, stored.columns), shape_text(rows, columns)));
}

// Reads this rank's pieces of what the checkpoint has; the names of those that it has not.
std::set<std::string> read_masters(const CheckpointReader& reader, Trainer& trainer) {
  const Masters masters = masters_of(reader);
  Context& host = trainer.model().context().host();
  std::set<std::string> lacking;
  std::vector<TensorPiece> pieces;
  std::vector<Tensor> values;
  for (const StatePiece& state : trainer.optimizer().state()) {
    if (state.role != StateRole::master) continue;
    const ParameterSpec& spec = state.piece.parameter->spec;
    const auto stored = masters.find(spec.name);
    if (stored == masters.end()) {
      lacking.insert(spec.name);
      continue;
    }
    require_same_shape(spec, stored->second, reader.folder().string());
    const Tensor data = host.empty({state.piece.range.size()}, stored->second.dtype, MemoryUse::workspace);
    pieces.push_back({spec.name, Role::master, spec.part, state.piece.range, data});
    values.push_back(state.piece.values);
  }
  reader.read(pieces);
  for (size_t i = 0; i < pieces.size(); ++i) {
    // Between types the host converts: a device is given what it has room for.
    const Tensor converted = host.empty({pieces[i].data.numel()}, values[i].dtype(), MemoryUse::workspace);
    copy(host, pieces[i].data, converted);
    copy(trainer.model().context(), converted, values[i]);
  }
  return lacking;
}

// Of all ranks: each holds some parts of the model.
std::set<std::string> names_of_all(const Group& world, const std::set<std::string>& mine) {
  std::set<std::string> all;
  for (const std::string& text : world.all_gather_text(fmt::format("{}", fmt::join(mine, "\n")))) {
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      all.insert(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  return all;
}

}  // namespace

StartingWeights load_starting_weights(Trainer& trainer, const std::filesystem::path& from,
                                      const std::string& tokenizer_hash) {
  const Group& world = trainer.model().mesh().world();
  const auto files = make_system_files();
  StartingWeights taken;
  Masters masters;
  std::set<std::string> lacking;
  const auto use = [&](const CheckpointReader& reader) {
    const std::string& hash = reader.info().tokenizer_hash;
    if (!hash.empty() && hash != tokenizer_hash) {
      throw DataError(
          fmt::format("{} was trained with another tokenizer than this run's: name that one's folder in "
                      "data.tokenizer, and "
                      "prepare the corpora with it",
                      reader.folder().string()));
    }
    masters = masters_of(reader);
    lacking = read_masters(reader, trainer);
    taken.checkpoint = reader.folder().string();
  };
  if (names_checkpoint(from)) {
    run_agreed(world, [&] { use(CheckpointReader(*files, from)); });
  } else if (!open_newest_agreed(world, *files, RunFolder{from}.checkpoints(), use)) {
    throw AgreedError(ExitCode::bad_data, fmt::format("train.init_from: {} holds no checkpoint",
                                                      RunFolder{from}.checkpoints().string()));
  }
  std::set<std::string> mine;
  for (const Parameter& p : trainer.model().store().parameters()) mine.insert(p.spec.name);
  const std::set<std::string> model = names_of_all(world, mine);
  const std::set<std::string> drawn = names_of_all(world, lacking);
  taken.drawn.assign(drawn.begin(), drawn.end());
  for (const auto& [name, tensor] : masters) {
    if (!model.contains(name)) taken.unused.push_back(name);
  }
  if (drawn.size() == model.size()) {
    throw AgreedError(
        ExitCode::bad_data,
        fmt::format("{} has none of this model's tensors: choose another train.init_from", taken.checkpoint));
  }
  trainer.weights_changed();
  return taken;
}

std::string describe(const StartingWeights& weights) {
  std::string text = "starting from the weights of " + weights.checkpoint;
  if (!weights.drawn.empty())
    text += fmt::format("; it lacks {}, which are drawn", fmt::join(weights.drawn, ", "));
  if (!weights.unused.empty()) text += fmt::format("; its {} are not used", fmt::join(weights.unused, ", "));
  return text;
}

}  // namespace normformer
