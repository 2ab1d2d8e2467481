#pragma once

#include <cstdint>
#include <span>

#include "normformer/core/philox.h"

namespace normformer {

/// Which tokens of a sample a masked language model predicts, and what it sees in their places (Devlin et al.
/// 2019, section 3.1), drawn anew for every sample that is read (Liu et al. 2019, section 4.1).
struct MaskingRule {
  double probability = 0.15;  ///< of a token to be predicted
  double kept = 0.1;          ///< share of these that are seen as they are
  double random = 0.1;        ///< share of these that are seen as a random token; others as `mask_token`
  int32_t mask_token = 0;
  int32_t start_token = 0;      ///< begins every sample and is neither predicted nor drawn
  int64_t ordinary_tokens = 0;  ///< random tokens are drawn from [0, ordinary_tokens), without start_token
  RandomStream stream = {};     ///< of the draws
};

/// Masks `tokens` of global sample `index` in place; `predicted`, as long, receives 1 where a token is to be
/// predicted and 0 elsewhere. start_token and mask_token are never predicted. A pure function of rule, index
/// and tokens.
void mask_sample(const MaskingRule& rule, int64_t index, std::span<int32_t> tokens,
                 std::span<uint8_t> predicted);

}  // namespace normformer
