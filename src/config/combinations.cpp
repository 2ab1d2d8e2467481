#include <algorithm>
#include <cmath>
#include <numeric>

#include <fmt/format.h>

#include "field.h"
#include "suggest.h"

namespace normformer {

namespace {

/// A sentence about keys that cannot stand together, and the keys it is about.
struct Conflict {
  std::vector<std::string> keys;
  std::string sentence;
};

/// The few divisors of `width` nearest to `heads`, as "4, 6, 8".
std::string near_divisors(int64_t width, int64_t heads) {
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d * d <= width; ++d) {
    if (width % d != 0) continue;
    divisors.push_back(d);
    if (d != width / d) divisors.push_back(width / d);
  }
  std::sort(divisors.begin(), divisors.end(), [&](int64_t a, int64_t b) {
    return std::pair(std::abs(a - heads), a) < std::pair(std::abs(b - heads), b);
  });
  divisors.resize(std::min<size_t>(divisors.size(), 4));
  std::sort(divisors.begin(), divisors.end());
  std::vector<std::string> words;
  for (const int64_t d : divisors) words.push_back(fmt::format("{}", d));
  return join(words);
}

void check_model(const ModelConfig& m, std::vector<Conflict>& found) {
  if (m.width % m.heads != 0) {
    found.push_back({{"model.heads", "model.width"},
                     fmt::format("model.heads = {} does not divide model.width = {}; heads that do: {}",
                                 m.heads, m.width, near_divisors(m.width, m.heads))});
  }
  if (m.positions == Positions::sinusoidal && (m.width % 2 != 0 || m.width < 4)) {
    found.push_back(
        {{"model.width", "model.positions"},
         fmt::format("sinusoidal positions need an even model.width of at least 4, not {}; or write "
                     "model.positions = \"learned\"",
                     m.width)});
  }
}

void check_labelled(const RunConfig& c, std::vector<Conflict>& found) {
  const DataConfig& d = c.data;
  if (c.model.head != OutputHead::classification) {
    for (const auto& [key, file] :
         {std::pair("data.train_labelled", d.train_labelled), {"data.valid_labelled", d.valid_labelled}}) {
      if (!file.empty()) {
        found.push_back({{key, "model.head"}, fmt::format("{} needs model.head = \"classification\"", key)});
      }
    }
    return;
  }
  for (const auto& [key, sources] : {std::pair("train", d.train), {"valid", d.valid}}) {
    if (sources.empty()) continue;
    found.push_back(
        {{fmt::format("data.{}", key), "model.head"},
         fmt::format("model.head = \"classification\" reads texts with labels, not data.{0}: name "
                     "them in data.{0}_labelled, and the tokenizer in data.tokenizer or by "
                     "train.init_from",
                     key)});
  }
  if (d.document_mask) {
    found.push_back({{"data.document_mask", "model.head"},
                     "data.document_mask = true has no use with model.head = \"classification\", whose "
                     "sequences are one text each"});
  }
}

void check_head(const RunConfig& c, std::vector<Conflict>& found) {
  const ModelConfig& m = c.model;
  if (m.head == OutputHead::language && m.attention == AttentionMask::bidirectional) {
    found.push_back(
        {{"model.attention", "model.head"},
         "model.attention = \"bidirectional\" shows the model the token that model.head = \"language\" "
         "asks it for; write model.head = \"masked_language\""});
  }
  if (m.head == OutputHead::masked_language && m.attention == AttentionMask::causal) {
    found.push_back({{"model.head", "model.attention"},
                     "model.head = \"masked_language\" needs model.attention = \"bidirectional\""});
  }
  if (m.head != OutputHead::language && c.device.cuda_graphs) {
    found.push_back(
        {{"device.cuda_graphs", "model.head"},
         "device.cuda_graphs = true needs model.head = \"language\": others predict another number of "
         "tokens in every micro-batch"});
  }
  if (m.attention == AttentionMask::bidirectional && c.data.document_mask) {
    found.push_back(
        {{"data.document_mask", "model.attention"},
         "data.document_mask = true needs model.attention = \"causal\": it hides what comes before "
         "a document, not what comes behind"});
  }
  if (m.classes == 1) {
    found.push_back({{"model.classes"},
                     "model.classes = 1 leaves nothing to tell apart; 0 means as many as there are labels"});
  }
  if (m.head != OutputHead::classification && m.classes > 0) {
    found.push_back({{"model.classes", "model.head"},
                     fmt::format("model.classes = {} needs model.head = \"classification\"", m.classes)});
  }
  check_labelled(c, found);
  if (c.data.mask_kept + c.data.mask_random > 1.0) {
    found.push_back(
        {{"data.mask_kept", "data.mask_random"},
         fmt::format("data.mask_kept = {} and data.mask_random = {} are shares of one whole, and more "
                     "than it together",
                     c.data.mask_kept, c.data.mask_random)});
  }
}

void check_optimizer(const OptimizerConfig& o, std::vector<Conflict>& found) {
  if (o.min_lr > o.lr) {
    found.push_back({{"optimizer.min_lr", "optimizer.lr"},
                     fmt::format("optimizer.min_lr = {} is above optimizer.lr = {}", o.min_lr, o.lr)});
  }
  const bool decays = o.decay != DecayStyle::constant && o.decay_updates > 0;
  if (decays && o.decay_updates <= o.warmup_updates) {
    found.push_back(
        {{"optimizer.decay_updates", "optimizer.warmup_updates", "optimizer.decay"},
         fmt::format("optimizer.decay_updates = {} counts from the first update and must be above "
                     "optimizer.warmup_updates = {}",
                     o.decay_updates, o.warmup_updates)});
  }
}

void check_parallel(const RunConfig& c, std::vector<Conflict>& found) {
  const ParallelConfig& p = c.parallel;
  const bool interleaved = p.schedule == PipelineSchedule::interleaved;
  if (p.virtual_stages > 1 && !interleaved) {
    found.push_back({{"parallel.virtual_stages", "parallel.schedule"},
                     fmt::format("parallel.virtual_stages = {} needs parallel.schedule = \"interleaved\"",
                                 p.virtual_stages)});
  }
  if (p.interleave_group > 0 && !interleaved) {
    found.push_back({{"parallel.interleave_group", "parallel.schedule"},
                     fmt::format("parallel.interleave_group = {} needs parallel.schedule = \"interleaved\"",
                                 p.interleave_group)});
  }
  if (p.interleave_group > 0 && p.interleave_group < p.pipeline) {
    found.push_back({{"parallel.interleave_group", "parallel.pipeline"},
                     fmt::format("parallel.interleave_group = {} is less than parallel.pipeline = {}: ranks "
                                 "would wait for each other",
                                 p.interleave_group, p.pipeline)});
  }
  if (p.context > 1 && c.model.length / 2 < p.context) {
    found.push_back(
        {{"parallel.context", "model.length"},
         fmt::format("parallel.context = {} needs sequences of at least two tokens for each of its "
                     "ranks, not model.length = {}",
                     p.context, c.model.length)});
  }
  if (p.split.empty()) return;
  const int64_t layers = std::accumulate(p.split.begin(), p.split.end(), int64_t{0});
  if (static_cast<int64_t>(p.split.size()) != p.parts()) {
    found.push_back(
        {{"parallel.split", "parallel.pipeline", "parallel.virtual_stages"},
         fmt::format("parallel.split has {} parts, but the pipeline has {}", p.split.size(), p.parts())});
  } else if (layers != c.model.layers) {
    found.push_back({{"parallel.split", "model.layers"},
                     fmt::format("the layers of parallel.split are {} together, not model.layers = {}",
                                 layers, c.model.layers)});
  }
}

void check_device(const RunConfig& c, std::vector<Conflict>& found) {
  if (c.device.cuda_graphs && (c.parallel.tensor > 1 || c.parallel.context > 1 || c.parallel.pipeline > 1)) {
    found.push_back(
        {{"device.cuda_graphs", "parallel.tensor", "parallel.context", "parallel.pipeline"},
         fmt::format(
             "device.cuda_graphs = true needs micro-batches that stay on one GPU, not parallel.tensor "
             "= {}, parallel.context = {} and parallel.pipeline = {}",
             c.parallel.tensor, c.parallel.context, c.parallel.pipeline)});
  }
  if (c.device.cuda_graphs && c.parallel.sharding != Sharding::optimizer) {
    found.push_back({{"device.cuda_graphs", "parallel.sharding"},
                     "device.cuda_graphs = true needs parallel.sharding = \"optimizer\": the others reduce "
                     "gradients behind every micro-batch"});
  }
  if (c.device.cuda_graphs && c.optimizer.optimistic) {
    found.push_back({{"device.cuda_graphs", "optimizer.optimistic"},
                     "optimizer.optimistic = true makes a micro-batch's forward again where an update was "
                     "wrong, which device.cuda_graphs = true has no graph of: leave out one of them"});
  }
}

void check_loss_scale(const TrainConfig& t, std::vector<Conflict>& found) {
  const TrainConfig d;
  if (!scales_loss(t.precision)) {
    const auto refuse_key = [&](const char* key, bool is_default) {
      const std::string name = std::string("train.") + key;
      if (is_default) return;
      found.push_back(
          {{name, "train.precision"},
           fmt::format("{} needs train.precision = \"fp16\" or \"fp16_memory_efficient\"", name)});
    };
    refuse_key("loss_scale_init", t.loss_scale_init == d.loss_scale_init);
    refuse_key("loss_scale_window", t.loss_scale_window == d.loss_scale_window);
    refuse_key("loss_scale_min", t.loss_scale_min == d.loss_scale_min);
    return;
  }
  int exponent = 0;
  if (std::frexp(t.loss_scale_init, &exponent) != 0.5) {
    found.push_back(
        {{"train.loss_scale_init"},
         fmt::format("train.loss_scale_init = {} is not a power of two, so that taking it out of gradients "
                     "would round them; write {}",
                     t.loss_scale_init, std::ldexp(1.0, exponent))});
  }
  if (t.loss_scale_min > t.loss_scale_init) {
    found.push_back({{"train.loss_scale_min", "train.loss_scale_init"},
                     fmt::format("train.loss_scale_min = {} is above train.loss_scale_init = {}",
                                 t.loss_scale_min, t.loss_scale_init)});
  }
}

void check_train(const RunConfig& c, std::vector<Conflict>& found) {
  if (c.train.micro_batch > c.train.global_batch) {
    found.push_back({{"train.micro_batch", "train.global_batch"},
                     fmt::format("train.micro_batch = {} is more than train.global_batch = {}",
                                 c.train.micro_batch, c.train.global_batch)});
  }
  if (c.train.recompute_layers > 0 && c.train.recompute == Recompute::none) {
    found.push_back(
        {{"train.recompute_layers", "train.recompute"},
         fmt::format("train.recompute_layers = {} needs train.recompute = \"selective\" or \"full\"",
                     c.train.recompute_layers)});
  }
  check_loss_scale(c.train, found);
  const bool classifies = c.model.head == OutputHead::classification;
  const char* const valid = classifies ? "data.valid_labelled" : "data.valid";
  if (c.train.valid_every > 0 && (classifies ? c.data.valid_labelled.empty() : c.data.valid.empty())) {
    found.push_back({{"train.valid_every", valid},
                     fmt::format("train.valid_every = {} needs a data set to validate on; name one in {}, or "
                                 "write train.valid_every = 0",
                                 c.train.valid_every, valid)});
  }
}

}  // namespace

void check_combinations(const RunConfig& config,
                        const std::function<std::string(const std::string& key)>& place_of) {
  std::vector<Conflict> found;
  check_model(config.model, found);
  check_head(config, found);
  check_optimizer(config.optimizer, found);
  check_train(config, found);
  check_parallel(config, found);
  check_device(config, found);
  if (found.empty()) return;
  const Conflict& first = found.front();
  // The defaults fit together, so that one of the keys was written; an override outranks the file it amends.
  std::string place;
  for (const std::string& key : first.keys) {
    const std::string written = place_of(key);
    const bool outranks = written.starts_with("--set ") && !place.starts_with("--set ");
    if (place.empty() || outranks) place = written;
  }
  refuse(place, first.sentence);
}

}  // namespace normformer
