#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "normformer/training/trainer.h"

namespace normformer {

/// What a run took from another one's weights.
struct StartingWeights {
  std::string checkpoint;           ///< the folder that they were read from
  std::vector<std::string> drawn;   ///< the model's tensors that it lacks, which stay as they were drawn
  std::vector<std::string> unused;  ///< its tensors that the model lacks
};

/// Fills the weights of a trainer, drawn before, from `from`: a run's folder, of which the newest checkpoint
/// is taken, or a "step-..." folder. Taken are all logical tensors that both have, in whatever layout and
/// precision they were written; moments and counters stay. `tokenizer_hash` is that of the run's own
/// tokenizer. Throws AgreedError where there is no checkpoint that can be read, where it shares no tensor
/// with the model, has one of the same name in another shape, or was trained with another tokenizer.
/// Collective over the world.
StartingWeights load_starting_weights(Trainer& trainer, const std::filesystem::path& from,
                                      const std::string& tokenizer_hash);

/// "starting from the weights of FOLDER; it lacks ..., which are drawn; its ... are not used"
std::string describe(const StartingWeights& weights);

}  // namespace normformer
