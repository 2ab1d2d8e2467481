#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "normformer/core/kept_choices.h"
#include "normformer/tensor/gpu.h"

// Timing would choose now this and now that, and with it the bits of results; so what it chose first is kept.

namespace normformer::ops::cuda {

/// The median of the milliseconds that a GPU takes for what `enqueue` enqueues, over a few calls. Waits.
float median_milliseconds(Gpu& gpu, const std::function<void()>& enqueue);

/// Where choices are kept that depend on the kind of GPU and on `library`, a name with a version; nothing
/// where the GPU does not tune or there is no place to keep them.
std::optional<KeptChoices> kept_choices_of(const Gpu& gpu, const std::string& library);

/// Two ways to the same result. Where both can go, each key goes the way that was faster when it was first
/// tried on this kind of GPU; without tuning, the first.
class FasterWay {
 public:
  /// `library` as in kept_choices_of.
  FasterWay(Gpu& gpu, const std::string& library) : gpu_(gpu), kept_(kept_choices_of(gpu, library)) {}

  /// Goes one of the ways, perhaps several times the first time. `first` returns false, having done nothing,
  /// where it cannot go.
  void run(const std::string& key, const std::function<bool()>& first, const std::function<void()>& second);

 private:
  bool first_is_faster(const std::string& key, const std::function<bool()>& first,
                       const std::function<void()>& second);

  Gpu& gpu_;
  std::optional<KeptChoices> kept_;
  std::map<std::string, bool> takes_first_;
};

}  // namespace normformer::ops::cuda
