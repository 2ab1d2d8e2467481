#pragma once

#include <cstdint>
#include <vector>

#include "normformer/tensor/tensor.h"

namespace normformer::ops::cpu {

/// The scales of heads repeated over the channels of each, in the accumulator type; empty where there are
/// none.
template <class T>
std::vector<Accumulator<T>> scales_by_channel(const Tensor& scales, int64_t columns) {
  std::vector<Accumulator<T>> by_channel;
  if (!scales) return by_channel;
  const T* values = scales.data<T>();
  const auto size = static_cast<size_t>(columns / scales.numel());
  by_channel.reserve(static_cast<size_t>(columns));
  for (int64_t head = 0; head < scales.numel(); ++head)
    by_channel.insert(by_channel.end(), size, static_cast<Accumulator<T>>(values[head]));
  return by_channel;
}

}  // namespace normformer::ops::cpu
