#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "normformer/core/error.h"

#include "field.h"
#include "suggest.h"
#include "values.h"

namespace normformer {

namespace {

/// No size comes near this, and the product of two stays within 64 bits.
constexpr int64_t largest_size = int64_t{1} << 30;
constexpr int64_t largest_degree = int64_t{1} << 20;

/// An enumeration's values and their names in files.
template <class Enum>
using Names = std::vector<std::pair<Enum, std::string>>;

template <class Enum>
std::vector<std::string> words_of(const Names<Enum>& names) {
  std::vector<std::string> words;
  for (const auto& [value, word] : names) words.push_back(word);
  return words;
}

template <class Enum>
std::string write_enum(const Names<Enum>& names, Enum value) {
  const auto known =
      std::find_if(names.begin(), names.end(), [&](const auto& pair) { return pair.first == value; });
  NF_CHECK(known != names.end(), "an enumeration's value without a name");
  return quoted(known->second);
}

/// Makes the fields of one section, in the order in which they are written.
template <class Section>
class SectionFields {
 public:
  SectionFields(std::vector<Field>& all, std::string name, Section RunConfig::*member)
      : all_(all), name_(std::move(name)), member_(member) {}

  template <class Int>
  void integer(const char* key, Int Section::*value, Integers range, const char* doc) {
    add(
        key, kind_of(range), doc, value,
        [range](const Field& f, const toml::node& n, const Origin& o) {
          return static_cast<Int>(read_integer(f, range, n, o));
        },
        [](Int v) { return fmt::format("{}", v); });
  }

  /// A list; `none` is written for an empty one.
  void integers(const char* key, std::vector<int64_t> Section::*value, Integers range, const char* none,
                const char* doc) {
    add(
        key, fmt::format("\"{}\" or an array, each {}", none, kind_of(range)), doc, value,
        [range, none](const Field& f, const toml::node& n, const Origin& o) {
          return read_integers(f, range, none, n, o);
        },
        [none](const std::vector<int64_t>& v) {
          return v.empty() ? quoted(none) : fmt::format("[{}]", fmt::join(v, ", "));
        },
        true);
  }

  void real(const char* key, double Section::*value, Reals range, const char* doc) {
    add(
        key, kind_of(range), doc, value,
        [range](const Field& f, const toml::node& n, const Origin& o) { return read_real(f, range, n, o); },
        write_real);
  }

  void boolean(const char* key, bool Section::*value, const char* doc) {
    add(
        key, "true or false", doc, value,
        [](const Field& f, const toml::node& n, const Origin& o) {
          if (!n.is_boolean()) refuse_value(f, n, o);
          return n.as_boolean()->get();
        },
        [](bool v) { return fmt::format("{}", v); });
  }

  void text(const char* key, std::string Section::*value, bool may_be_empty, const char* doc) {
    add(
        key, may_be_empty ? "a string" : "a non-empty string", doc, value,
        [may_be_empty](const Field& f, const toml::node& n, const Origin& o) {
          if (!n.is_string() || (!may_be_empty && n.as_string()->get().empty())) refuse_value(f, n, o);
          return n.as_string()->get();
        },
        [](const std::string& v) { return quoted(v); }, true);
  }

  /// A list of 1 to `most` non-empty strings; one alone may stand without brackets.
  void texts(const char* key, std::vector<std::string> Section::*value, size_t most, const char* doc) {
    add(
        key, fmt::format("a non-empty string, or an array of 1 to {}", most), doc, value,
        [most](const Field& f, const toml::node& n, const Origin& o) { return read_texts(f, most, n, o); },
        write_texts, true);
  }

  template <class Enum>
  void choice(const char* key, Enum Section::*value, const Names<Enum>& names, const char* doc) {
    std::vector<std::string> words;
    for (const std::string& word : words_of(names)) words.push_back(quoted(word));
    const std::string kind = words.size() == 1 ? words.front() : "one of " + join(words);
    add(
        key, kind, doc, value,
        [names](const Field& f, const toml::node& n, const Origin& o) {
          return names[read_word(f, words_of(names), n, o)].first;
        },
        [names](Enum v) { return write_enum(names, v); }, true);
  }

  void sources(const char* key, std::vector<DataSource> Section::*value, const char* doc) {
    add(key, "a string, or an array of strings or of { prefix, weight } tables", doc, value, read_sources,
        write_sources, true);
  }

  /// For these keys of the section, or for all that were added so far.
  void on_resume(ResumePolicy policy, std::initializer_list<std::string_view> keys = {}) {
    for (Field& field : all_) {
      if (field.section != name_) continue;
      if (keys.size() == 0 || std::find(keys.begin(), keys.end(), field.key) != keys.end())
        field.on_resume = policy;
    }
  }

 private:
  template <class T, class Read, class Write>
  void add(const char* key, std::string kind, const char* doc, T Section::*value, Read read, Write write,
           bool text = false) {
    Field field{name_, key, std::move(kind), doc, text, {}, {}, ResumePolicy::told};
    field.read = [read = std::move(read), value, member = member_, self = field](
                     RunConfig& config, const toml::node& node, const Origin& origin) {
      config.*member.*value = read(self, node, origin);
    };
    field.write = [write = std::move(write), value, member = member_](const RunConfig& config) {
      return write(config.*member.*value);
    };
    all_.push_back(std::move(field));
  }

  std::vector<Field>& all_;
  std::string name_;
  Section RunConfig::*member_;
};

void add_model(std::vector<Field>& all) {
  using M = ModelConfig;
  SectionFields<M> s(all, "model", &RunConfig::model);
  s.integer("layers", &M::layers, {1, largest_size}, "transformer layers");
  s.integer("width", &M::width, {1, largest_size}, "channels of the residual stream");
  s.integer("heads", &M::heads, {1, largest_size}, "attention heads; divides width");
  s.integer("ffn", &M::ffn, {0, largest_size}, "features inside the feed-forward block; 0 means 4 x width");
  s.integer("vocab", &M::vocab, {0, largest_size}, "rows of the token embedding; 0 means as the corpus says");
  s.integer("length", &M::length, {1, largest_size}, "tokens of a sequence");
  s.choice("head_scale", &M::head_scale,
           {{HeadScale::none, "none"}, {HeadScale::paper, "paper"}, {HeadScale::fairseq, "fairseq"}},
           "learned scale per attention head: before the output projection (paper) or after it (fairseq)");
  s.boolean("post_attention_norm", &M::post_attention_norm, "LayerNorm on the attention block's output");
  s.boolean("ffn_norm", &M::ffn_norm, "LayerNorm after the feed-forward block's activation");
  s.boolean("residual_scale", &M::residual_scale,
            "learned scale per channel on the feed-forward block's residual");
  s.boolean("qkv_norm", &M::qkv_norm, "LayerNorms on queries, keys and values, over all heads");
  s.choice("attention", &M::attention,
           {{AttentionMask::causal, "causal"}, {AttentionMask::bidirectional, "bidirectional"}},
           "a token attends to what is before it, or to all of its sequence");
  s.choice("head", &M::head,
           {{OutputHead::language, "language"},
            {OutputHead::masked_language, "masked_language"},
            {OutputHead::classification, "classification"}},
           "what the model predicts: the next token, masked tokens, or the class of a text");
  s.integer(
      "classes", &M::classes, {0, largest_size},
      "classes that model.head = \"classification\" tells apart; 0 means as many as the labels trained on");
  s.choice("activation", &M::activation,
           {{Activation::gelu, "gelu"},
            {Activation::gelu_tanh, "gelu_tanh"},
            {Activation::relu_squared, "relu_squared"}},
           "activation of the feed-forward block; gelu is the erf form");
  s.choice("norm_position", &M::norm_position, {{NormPosition::pre, "pre"}, {NormPosition::post, "post"}},
           "LayerNorm on each sub-layer's input (pre) or on the sum after its residual (post)");
  s.choice("positions", &M::positions,
           {{Positions::sinusoidal, "sinusoidal"}, {Positions::learned, "learned"}},
           "position information added to the token embeddings");
  s.boolean("embedding_scale", &M::embedding_scale, "multiply token embeddings by sqrt(width)");
  s.choice(
      "init", &M::init,
      {{Initialisation::fairseq, "fairseq"}, {Initialisation::gpt2, "gpt2"}, {Initialisation::bert, "bert"}},
      "how initial weights are drawn");
  s.choice("ffn_norm_form", &M::ffn_norm_form,
           {{FfnNormForm::folded, "folded"}, {FfnNormForm::plain, "plain"}},
           "how the feed-forward LayerNorm is computed; both are exact and differ in rounding");
  s.real("norm_eps", &M::norm_eps, {.low = 0, .high = 1, .above = true},
         "added to the variance in every LayerNorm");
  s.real("embedding_dropout", &M::embedding_dropout, {0, 1},
         "dropout on the sum of token and position embeddings");
  s.real("residual_dropout", &M::residual_dropout, {0, 1}, "dropout on each sub-layer's output");
  s.real("attention_dropout", &M::attention_dropout, {0, 1}, "dropout on attention probabilities");
  s.real("activation_dropout", &M::activation_dropout, {0, 1},
         "dropout after the feed-forward block's activation");
  s.on_resume(ResumePolicy::must_equal);
  s.on_resume(ResumePolicy::told, {"ffn_norm_form", "embedding_dropout", "residual_dropout",
                                   "attention_dropout", "activation_dropout"});
}

void add_parallel(std::vector<Field>& all) {
  using P = ParallelConfig;
  SectionFields<P> s(all, "parallel", &RunConfig::parallel);
  s.integer("tensor", &P::tensor, {1, largest_degree}, "ranks that share every layer");
  s.boolean(
      "sequence", &P::sequence,
      "the ranks that share a layer also share its tokens, wherever they are not multiplied: less memory");
  s.integer(
      "context", &P::context, {1, largest_degree},
      "ranks that share every sequence's tokens, at least two each: for long sequences; docs/context.md");
  s.integer("pipeline", &P::pipeline, {1, largest_degree}, "stages that the layers are cut into");
  s.integer("data", &P::data, {0, largest_degree},
            "replicas that share the batch; 0 means the ranks left over");
  s.choice("schedule", &P::schedule,
           {{PipelineSchedule::gpipe, "gpipe"},
            {PipelineSchedule::one_f_one_b, "1f1b"},
            {PipelineSchedule::interleaved, "interleaved"},
            {PipelineSchedule::zb_h1, "zb_h1"},
            {PipelineSchedule::zb_h2, "zb_h2"},
            {PipelineSchedule::zb_v, "zb_v"}},
           "order in which the stages run their micro-batches; docs/pipeline.md says which suits when");
  s.integer("virtual_stages", &P::virtual_stages, {1, largest_degree},
            "parts of the model on each rank, with schedule = \"interleaved\"");
  s.integer(
      "interleave_group", &P::interleave_group, {0, largest_size},
      "with schedule = \"interleaved\": micro-batches that pass a part in a row; 0 means as many as stages");
  s.integers(
      "split", &P::split, {1, largest_size}, "auto",
      "layers of each part of the pipeline, first to last; auto weighs layers against the output's logits");
  s.choice(
      "sharding", &P::sharding,
      {{Sharding::optimizer, "optimizer"},
       {Sharding::gradients, "gradients"},
       {Sharding::parameters, "parameters"}},
      "what replicas split among them (ZeRO-1, -2, -3): optimizer state; layers' gradients, too, reduced "
      "behind every micro-batch; and layers' weights, too, gathered for every use");
  s.integer(
      "shard_group", &P::shard_group, {0, largest_degree},
      "so many consecutive replicas split that among them, and others hold copies, which takes memory and "
      "spares traffic between hosts; divides parallel.data x context; 0 means all");
  s.real("bucket_mib", &P::bucket_mib, {.low = 0, .high = 65536, .above = true},
         "gradients are reduced over replicas in pieces of this many MiB");
  s.boolean("overlap_gradients", &P::overlap_gradients,
            "reduce gradients over replicas beside the rest of the backward; not with device.cuda_graphs");
  s.boolean("overlap_parameters", &P::overlap_parameters,
            "gather weights from replicas beside what comes before their use; not with device.cuda_graphs");
  s.boolean("overlap_pipeline", &P::overlap_pipeline,
            "receive what comes from the next stage while computing");
  s.boolean("overlap_context", &P::overlap_context,
            "receive the keys and values of one rank while computing with those of another");
  s.boolean("overlap_tensor", &P::overlap_tensor,
            "reduce gradients over the ranks that share a layer while computing those of its weights");
  s.on_resume(ResumePolicy::irrelevant, {"overlap_gradients", "overlap_parameters", "overlap_pipeline",
                                         "overlap_context", "overlap_tensor", "bucket_mib"});
}

void add_data(std::vector<Field>& all) {
  using D = DataConfig;
  SectionFields<D> s(all, "data", &RunConfig::data);
  s.sources("train", &D::train, "data sets trained on: paths of .bin/.idx pairs without extension");
  s.sources("valid", &D::valid, "data sets validated on");
  s.text("tokenizer", &D::tokenizer, true,
         "folder with vocab.json and merges.txt; empty means beside the first training set");
  s.boolean("document_mask", &D::document_mask, "attention and loss stop at document ends");
  s.real("mask_probability", &D::mask_probability, {.low = 0, .high = 1, .above = true},
         "masked language models: share of tokens that are predicted");
  s.real("mask_kept", &D::mask_kept, {0, 1}, "of these, the share that the model sees as they are");
  s.real("mask_random", &D::mask_random, {0, 1}, "of these, the share that it sees as a random token");
  s.integer("mask_token", &D::mask_token, {0, largest_size},
            "id that it sees for the others; 0 means the first one behind the tokenizer's");
  s.text("train_labelled", &D::train_labelled, true, "classification: texts trained on, .tsv or .jsonl");
  s.text("valid_labelled", &D::valid_labelled, true, "classification: texts validated on");
  s.texts("text_fields", &D::text_fields, 2, "columns, or JSON keys, of a text or of a pair of texts");
  s.text("label_field", &D::label_field, false, "column, or JSON key, of the class");
}

void add_optimizer(std::vector<Field>& all) {
  using O = OptimizerConfig;
  SectionFields<O> s(all, "optimizer", &RunConfig::optimizer);
  s.real("lr", &O::lr, {.low = 0, .above = true}, "largest learning rate");
  s.real("beta1", &O::beta1, {0, 1}, "Adam's decay of the gradient's mean");
  s.real("beta2", &O::beta2, {0, 1}, "Adam's decay of the squared gradient's mean");
  s.real("eps", &O::eps, {.low = 0, .above = true}, "Adam's term against division by zero");
  s.real("weight_decay", &O::weight_decay, {0}, "decoupled weight decay");
  s.choice("eps_form", &O::eps_form, {{AdamEps::torch, "torch"}, {AdamEps::fairseq, "fairseq"}},
           "eps added to sqrt of the corrected second moment (torch) or of the uncorrected one (fairseq)");
  s.real("clip_norm", &O::clip_norm, {0}, "largest global gradient norm; 0 means none");
  s.boolean(
      "optimistic", &O::optimistic,
      "update before the norm of all gradients is known, and take back what was wrong: no barrier between "
      "steps, for a copy of the optimizer's state");
  s.integer("warmup_updates", &O::warmup_updates, {0}, "updates over which the learning rate rises from 0");
  s.choice("decay", &O::decay,
           {{DecayStyle::constant, "constant"},
            {DecayStyle::linear, "linear"},
            {DecayStyle::cosine, "cosine"},
            {DecayStyle::polynomial, "polynomial"}},
           "shape of the learning rate after its warm-up");
  s.integer("decay_updates", &O::decay_updates, {0},
            "updates until min_lr is reached; 0 means train.updates");
  s.real("min_lr", &O::min_lr, {0}, "learning rate at the end of the decay");
  s.real("decay_power", &O::decay_power, {.low = 0, .above = true}, "exponent of the polynomial decay");
  s.on_resume(ResumePolicy::irrelevant, {"optimistic"});
}

void add_train(std::vector<Field>& all) {
  using T = TrainConfig;
  SectionFields<T> s(all, "train", &RunConfig::train);
  s.integer("updates", &T::updates, {1}, "updates of the run");
  s.integer("global_batch", &T::global_batch, {1, largest_size}, "sequences of one update, over all ranks");
  s.integer("micro_batch", &T::micro_batch, {1, largest_size}, "sequences that one rank computes at a time");
  s.choice("precision", &T::precision,
           {{Precision::fp64, "fp64"},
            {Precision::fp32, "fp32"},
            {Precision::bf16, "bf16"},
            {Precision::fp16, "fp16"},
            {Precision::fp16_memory_efficient, "fp16_memory_efficient"}},
           "type of weights and activations; fp16_memory_efficient keeps no fp32 copy of the weights");
  s.choice("recompute", &T::recompute,
           {{Recompute::none, "none"}, {Recompute::selective, "selective"}, {Recompute::full, "full"}},
           "what backward computes anew instead of keeping: nothing, LayerNorm outputs and activations, or "
           "whole layers");
  s.integer("recompute_layers", &T::recompute_layers, {0, largest_size},
            "recompute in the first so many layers of each part of the model only; 0 means in all");
  s.integer("seed", &T::seed, {0}, "of initial weights, data order and dropout");
  s.text("init_from", &T::init_from, true,
         "a run, or one of its checkpoints, whose weights this run starts from as far as both have them");
  s.integer("valid_every", &T::valid_every, {0}, "updates between validations; 0 means only at the end");
  s.integer("valid_sequences", &T::valid_sequences, {0}, "sequences of a validation; 0 means all");
  s.integer("log_every", &T::log_every, {1}, "updates between lines of progress");
  s.integer("max_skipped", &T::max_skipped, {1},
            "consecutive updates left out, not finite or spikes, after which the run ends; overflows in fp16 "
            "do not "
            "count");
  s.real("loss_scale_init", &T::loss_scale_init, {.low = 0, .above = true},
         "in fp16: what the loss' gradient is multiplied by at first, a power of two");
  s.integer("loss_scale_window", &T::loss_scale_window, {0},
            "in fp16: updates without overflow after which the scale doubles; 0 means 2^14 divided by the "
            "micro-batches of a global batch, as fairseq has it");
  s.real("loss_scale_min", &T::loss_scale_min, {.low = 0, .above = true},
         "in fp16: the run ends where overflows halve the scale below this");
  s.on_resume(ResumePolicy::must_equal, {"global_batch"});  // it numbers the samples that were seen
  s.on_resume(ResumePolicy::irrelevant,
              {"recompute", "recompute_layers", "valid_every", "valid_sequences", "log_every"});
}

void add_checkpoint(std::vector<Field>& all) {
  using C = CheckpointConfig;
  SectionFields<C> s(all, "checkpoint", &RunConfig::checkpoint);
  s.text("folder", &C::folder, false,
         "the run's folder: log, metrics, resolved configuration and checkpoints");
  s.integer("every", &C::every, {0}, "updates between checkpoints; 0 means only at the end and when stopped");
  s.integer("keep", &C::keep, {1}, "newest checkpoints that stay");
  s.integer("keep_every", &C::keep_every, {0},
            "checkpoints after a multiple of so many updates stay for ever, too; 0 means none");
  s.boolean("async", &C::async, "write checkpoints beside training, which waits for a copy in memory only");
  s.real("staging_mib", &C::staging_mib, {.low = 0},
         "memory of each rank for that copy; with less than what the rank saves training waits for the disk "
         "to make room; 0 means as much as the rank saves");
  s.choice("on_failure", &C::on_failure, {{SaveFailure::go_on, "continue"}, {SaveFailure::stop, "stop"}},
           "what happens where a checkpoint cannot be saved: training goes on, and says so, or the run ends");
  s.choice("on_damage", &C::on_damage, {{DamagePolicy::older, "older"}, {DamagePolicy::stop, "stop"}},
           "what --resume does where the newest checkpoint is damaged: it takes the one before, or ends");
  s.on_resume(ResumePolicy::irrelevant);
}

void add_health(std::vector<Field>& all) {
  using H = HealthConfig;
  SectionFields<H> s(all, "health", &RunConfig::health);
  s.real(
      "watchdog_seconds", &H::watchdog_seconds, {.low = 0},
      "a rank that has made no progress for so long reports what every rank does and ends the job; 0 means "
      "never");
  s.integer("replica_check_every", &H::replica_check_every, {0},
            "updates between comparisons of the weights that several ranks hold; 0 means none");
  s.real("straggler_factor", &H::straggler_factor, {.low = 0},
         "a rank whose computing takes so many times the median of its pipeline stage's ranks is named; 0 "
         "means none is");
  s.on_resume(ResumePolicy::irrelevant);
  s.real("spike_zscore", &H::spike_zscore, {.low = 0},
         "a loss or gradient norm so many robust standard deviations above the median of the batches before "
         "is a spike; 0 means none is");
  s.integer("spike_window", &H::spike_window, {8, 100000}, "batches that a batch is compared with");
  s.choice("on_spike", &H::on_spike,
           {{SpikePolicy::log, "log"}, {SpikePolicy::skip, "skip"}, {SpikePolicy::rollback, "rollback"}},
           "a spike is told only, its update is left out, or the run goes back to its newest checkpoint and "
           "leaves out the batches since");
  s.choice("on_nonfinite", &H::on_nonfinite,
           {{NonfinitePolicy::skip, "skip"}, {NonfinitePolicy::rollback, "rollback"}},
           "the same for a loss or gradient that is not finite; overflows in fp16 are always skipped");
  s.integer("max_rollbacks", &H::max_rollbacks, {0},
            "times that a run goes back without coming to a new checkpoint; then it ends");
  s.real(
      "explosion_rise", &H::explosion_rise, {.low = 0},
      "stability tests: the run ends, in good order, where the loss has risen so far above its lowest or is "
      "not finite; 0 means never");
}

void add_metrics(std::vector<Field>& all) {
  using R = MetricsConfig;
  SectionFields<R> s(all, "metrics", &RunConfig::metrics);
  s.integer("gradient_norms_every", &R::gradient_norms_every, {0},
            "updates between records of the L1 and L2 norm of each parameter's gradient; 0 means none");
  s.integer("distributions_every", &R::distributions_every, {0},
            "updates between records of how learned scales and gains are distributed; 0 means none");
  s.boolean("tensorboard", &R::tensorboard, "write event files for TensorBoard");
  s.on_resume(ResumePolicy::irrelevant);
}

void add_device(std::vector<Field>& all) {
  using D = DeviceConfig;
  SectionFields<D> s(all, "device", &RunConfig::device);
  s.choice("kind", &D::kind, {{DeviceChoice::cpu, "cpu"}, {DeviceChoice::cuda, "cuda"}},
           "computing device of every rank; GPUs are given out by a rank's number on its host");
  s.integer("threads", &D::threads, {0, 4096}, "threads of one rank; 0 means its share of the host's cores");
  s.boolean("tf32", &D::tf32, "on GPUs: fp32 products round their factors to 11 bits");
  s.boolean("tune_products", &D::tune_products,
            "on GPUs: time cuBLASLt's algorithms once for each product and keep the fastest in "
            "$NORMFORMER_CACHE or "
            "~/.cache/normformer, for all later runs");
  s.boolean(
      "cuda_graphs", &D::cuda_graphs,
      "on GPUs: give each pass of a micro-batch to the GPU as one CUDA graph; for small micro-batches, "
      "where starting kernels one by one takes longer than they do; gradients and weights of replicas do "
      "not overlap then");
  s.choice("transport", &D::transport,
           {{GpuTransport::automatic, "auto"}, {GpuTransport::nccl, "nccl"}, {GpuTransport::host, "host"}},
           "between GPUs: nccl needs a GPU for each rank; host goes by way of host memory");
  s.on_resume(ResumePolicy::irrelevant, {"threads", "tune_products", "cuda_graphs", "transport"});
}

}  // namespace

const std::vector<Field>& fields() {
  static const std::vector<Field> table = [] {
    std::vector<Field> all;
    add_model(all);
    add_parallel(all);
    add_data(all);
    add_optimizer(all);
    add_train(all);
    add_checkpoint(all);
    add_health(all);
    add_metrics(all);
    add_device(all);
    return all;
  }();
  return table;
}

std::vector<std::string> section_names() {
  std::vector<std::string> names;
  for (const Field& field : fields()) {
    if (names.empty() || names.back() != field.section) names.push_back(field.section);
  }
  return names;
}

const Field* find_field(std::string_view section, std::string_view key) {
  for (const Field& field : fields()) {
    if (field.section == section && field.key == key) return &field;
  }
  return nullptr;
}

}  // namespace normformer
