#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace normformer {

/// Where the learned scale per attention head acts (NormFormer, section 2; fairseq's code differs from its
/// paper).
enum class HeadScale {
  none,
  paper,    ///< on each head's output, before the output projection
  fairseq,  ///< on the projected output, viewed as heads of consecutive channels
};

/// The feed-forward block's activation. `gelu` is the erf form, `gelu_tanh` its tanh approximation.
enum class Activation { gelu, gelu_tanh, relu_squared };

/// Whether a sub-layer's LayerNorm acts on its input (Pre-LN) or on the sum after its residual (Post-LN).
enum class NormPosition { pre, post };

/// Position information added to the token embeddings. `sinusoidal` is fairseq's table, without parameters.
enum class Positions { sinusoidal, learned };

/// Which tokens of its sequence a token attends to: itself and those before it, or all.
enum class AttentionMask { causal, bidirectional };

/// What is made of the last layer's output.
enum class OutputHead {
  language,         ///< logits by the tied token embedding
  masked_language,  ///< RoBERTa's: a product, an activation, a LayerNorm, then logits by the tied embedding
                    ///< plus a bias; at masked tokens only
  classification,   ///< RoBERTa's: of one token of each sequence a product, tanh, a product onto the classes
};

/// How initial weights are drawn: fairseq's transformer_lm_gpt, GPT-2's N(0, 0.02) with scaled residual
/// projections, or BERT's N(0, 0.02) for every matrix.
enum class Initialisation { fairseq, gpt2, bert };

/// How the LayerNorm inside the feed-forward block is computed. Both are exact; they differ in rounding.
enum class FfnNormForm {
  folded,  ///< statistics travel with fc2's own reduction, gains folded into its weights: no collective of
           ///< its own
  plain,   ///< statistics reduced over the tensor-parallel group, then normalised, as written in the paper
};

/// What weights and activations are stored in and products computed from. Master weights and main gradients
/// are fp32 (fp64 in fp64). Both fp16 scale the loss; docs/mixed-precision.md says what is kept in which
/// type.
enum class Precision {
  fp64,
  fp32,
  bf16,
  fp16,
  fp16_memory_efficient,  ///< the fp16 weights are the masters (fairseq's --memory-efficient-fp16)
};

/// Whether gradients need a loss scale to stay within the precision's range.
constexpr bool scales_loss(Precision p) {
  return p == Precision::fp16 || p == Precision::fp16_memory_efficient;
}

/// The shape of the learning rate after its linear warm-up.
enum class DecayStyle { constant, linear, cosine, polynomial };

/// Which order a pipeline's stages run their micro-batches in; `one_f_one_b` is "1f1b" in files.
enum class PipelineSchedule { gpipe, one_f_one_b, interleaved, zb_h1, zb_h2, zb_v };

/// What is split over data-parallel replicas (ZeRO, Rajbhandari et al. 2020, section 5): optimizer state;
/// gradients of layers, too; and their weights, too.
enum class Sharding { optimizer, gradients, parameters };

/// What a micro-batch's backward computes anew instead of keeping it: nothing; what is cheap to compute and
/// large to keep (LayerNorm outputs and activations; Korthikanti et al. 2022, section 5); or whole layers, of
/// which only the input is kept (Chen et al. 2016).
enum class Recompute { none, selective, full };

/// Where Adam's eps stands: torch adds it to sqrt(v_hat); fairseq adds it to sqrt(v) before the bias
/// correction.
enum class AdamEps { torch, fairseq };

/// The computing device of every rank.
enum class DeviceChoice { cpu, cuda };

/// What a run does about a save that failed.
enum class SaveFailure { go_on, stop };

/// What a run does about a newest checkpoint that is damaged: resume from the one before, or end.
enum class DamagePolicy { older, stop };

/// What becomes of a batch whose loss or gradient norm is far above those before it: it is told only; its
/// update is left out; or the run goes back to its newest checkpoint and leaves out all batches since.
enum class SpikePolicy { log, skip, rollback };

/// What becomes of a batch whose loss or gradient is not finite: as of a spike's.
enum class NonfinitePolicy { skip, rollback };

/// What carries tensors between GPUs: NCCL, which `automatic` takes where every rank has a GPU of its own, or
/// what joins the hosts (MPI, TCP), by way of host memory.
enum class GpuTransport { automatic, nccl, host };

/// The model's shape and switches. Sizes count elements of the whole model, never of one rank's share.
struct ModelConfig {
  int64_t layers = 4;
  int64_t width = 256;   ///< channels of the residual stream, d
  int64_t heads = 4;     ///< attention heads; divides width
  int64_t ffn = 0;       ///< features inside the feed-forward block; 0 means 4 x width
  int64_t vocab = 0;     ///< rows of the token embedding; 0 means as the corpus' manifest says
  int64_t length = 256;  ///< tokens of a sequence, T
  HeadScale head_scale = HeadScale::none;
  bool post_attention_norm = false;
  bool ffn_norm = false;
  bool residual_scale = false;  ///< a learned scale per channel on the feed-forward block's residual
  bool qkv_norm = false;        ///< LayerNorms on queries, keys and values, each over all its heads' channels
  AttentionMask attention = AttentionMask::causal;
  OutputHead head = OutputHead::language;
  int64_t classes = 0;  ///< of `classification`; 0 means as many as the training texts have labels
  Activation activation = Activation::gelu;
  NormPosition norm_position = NormPosition::pre;
  Positions positions = Positions::sinusoidal;
  bool embedding_scale = true;  ///< multiply token embeddings by sqrt(width)
  Initialisation init = Initialisation::fairseq;
  FfnNormForm ffn_norm_form = FfnNormForm::folded;
  double norm_eps = 1e-5;
  double embedding_dropout = 0.0;   ///< on the sum of token and position embeddings
  double residual_dropout = 0.0;    ///< on each sub-layer's output before its residual sum
  double attention_dropout = 0.0;   ///< on attention probabilities
  double activation_dropout = 0.0;  ///< after the activation, before the FFN LayerNorm

  int64_t head_size() const { return width / heads; }
  bool operator==(const ModelConfig&) const = default;
};

/// Degrees of parallelism. Their product is the number of ranks; data = 0 means whatever is left.
struct ParallelConfig {
  int64_t tensor = 1;
  bool sequence =
      false;  ///< ranks of a tensor group share the residual stream's tokens too; 1 rank has them all
  int64_t context = 1;  ///< ranks that share every sequence's tokens
  int64_t pipeline = 1;
  int64_t data = 0;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  int64_t virtual_stages = 1;       ///< parts of the model on each rank; other than 1 with `interleaved` only
  int64_t interleave_group = 0;     ///< micro-batches that pass a part in a row; 0 means as many as stages
  std::vector<int64_t> split = {};  ///< layers of each part, in their order; empty: by what the parts cost
  Sharding sharding = Sharding::optimizer;
  int64_t shard_group = 0;   ///< consecutive replicas that share what `sharding` splits; 0 means all
  double bucket_mib = 32.0;  ///< gradients are reduced over data-parallel ranks in pieces of about this size
  bool overlap_gradients = true;   ///< reduced beside the rest of the backward
  bool overlap_parameters = true;  ///< gathered beside what comes before their use
  bool overlap_pipeline = true;    ///< received while computing
  bool overlap_context = true;     ///< keys and values received while computing with others
  bool overlap_tensor = false;     ///< gradients of inputs reduced beside the computing of those of weights

  /// Parts of the model on each rank: `zb_v` always has two.
  int64_t parts_of_rank() const { return schedule == PipelineSchedule::zb_v ? 2 : virtual_stages; }
  int64_t parts() const { return pipeline * parts_of_rank(); }
  bool operator==(const ParallelConfig&) const = default;
};

/// One tokenized data set: the path of its .bin/.idx without extension, and its share of the blend.
struct DataSource {
  std::string prefix;
  double weight = 1.0;
  bool operator==(const DataSource&) const = default;
};

/// What is trained on.
struct DataConfig {
  std::vector<DataSource> train;
  std::vector<DataSource> valid;
  std::string tokenizer;  ///< folder with vocab.json and merges.txt; "" means beside the first training set
  bool document_mask = false;  ///< attention and loss stop at document ends
  // Masked language models (Devlin et al. 2019, section 3.1; masks drawn anew whenever a sample is read, as
  // in Liu et al. 2019, section 4.1).
  double mask_probability = 0.15;  ///< of a token to be predicted
  double mask_kept = 0.1;          ///< share of these that the model sees as they are
  double mask_random = 0.1;        ///< share of these that it sees as a random token; others as mask_token
  int64_t mask_token = 0;          ///< 0 means the first id behind the tokenizer's
  // Sequence classification: TSV files with a header, or JSONL.
  std::string train_labelled;
  std::string valid_labelled;
  std::vector<std::string> text_fields = {"sentence"};  ///< one, or two for pairs
  std::string label_field = "label";
  bool operator==(const DataConfig&) const = default;
};

/// How the weights move.
struct OptimizerConfig {
  double lr = 6e-4;
  double beta1 = 0.9;
  double beta2 = 0.98;
  double eps = 1e-8;
  double weight_decay = 0.01;  ///< decoupled, on every parameter as in the paper
  AdamEps eps_form = AdamEps::torch;
  double clip_norm = 0.0;   ///< largest global gradient norm; 0 means none
  bool optimistic = false;  ///< update before the gradients' norm is known, and take back what was wrong
  int64_t warmup_updates = 0;
  DecayStyle decay = DecayStyle::linear;
  int64_t decay_updates = 0;  ///< updates until min_lr is reached; 0 means train.updates
  double min_lr = 0.0;
  double decay_power = 1.0;  ///< exponent of `polynomial`
  bool operator==(const OptimizerConfig&) const = default;
};

/// One run: how long, in what batches, what is printed and saved.
struct TrainConfig {
  int64_t updates = 1000;
  int64_t global_batch = 8;  ///< sequences of one update, over all ranks
  int64_t micro_batch = 1;   ///< sequences that one rank computes at a time
  Precision precision = Precision::fp32;
  Recompute recompute = Recompute::none;
  int64_t recompute_layers = 0;  ///< the first so many layers of each part of the model; 0 means all
  uint64_t seed = 1;
  std::string init_from;        ///< a run or checkpoint whose weights this run starts from; "": none
  int64_t valid_every = 0;      ///< updates between validations; 0 means only at the end
  int64_t valid_sequences = 0;  ///< sequences of a validation; 0 means all
  int64_t log_every = 1;
  int64_t max_skipped =
      10;  ///< consecutive non-finite updates after which the run ends; overflows in fp16 do not count
  double loss_scale_init =
      128.0;                      ///< fp16: what the loss' gradient is multiplied by at first; a power of two
  int64_t loss_scale_window = 0;  ///< fp16: updates without overflow after which the scale doubles; 0 means
                                  ///< 2^14 divided by the batch's micro-batches
  double loss_scale_min = 1e-4;   ///< fp16: the run ends where the scale falls below
  bool operator==(const TrainConfig&) const = default;
};

/// Where a run's files go and which checkpoints stay.
struct CheckpointConfig {
  std::string folder =
      "runs/run";            ///< the run's folder: log, metrics, resolved configuration and checkpoints
  int64_t every = 0;         ///< updates between checkpoints; 0 means only at the end and when stopped
  int64_t keep = 3;          ///< newest checkpoints that stay; at least 1
  int64_t keep_every = 0;    ///< checkpoints after a multiple of so many updates stay for ever; 0 means none
  bool async = true;         ///< written beside training, which waits for a copy in memory only
  double staging_mib = 0.0;  ///< of that copy, per rank; 0 means all that the rank saves
  SaveFailure on_failure = SaveFailure::go_on;
  DamagePolicy on_damage = DamagePolicy::older;
  bool operator==(const CheckpointConfig&) const = default;
};

/// What a run watches itself for.
struct HealthConfig {
  double watchdog_seconds =
      600.0;  ///< without progress after which a rank reports and ends the job; 0: never
  int64_t replica_check_every = 100;  ///< updates between comparisons of what ranks hold alike; 0 means none
  double straggler_factor =
      1.5;                     ///< a rank that computes so many times as long as the median is named; 0: none
  double spike_zscore = 0.0;   ///< robust standard deviations above the median that make a spike; 0: none
  int64_t spike_window = 128;  ///< batches that a batch is compared with
  SpikePolicy on_spike = SpikePolicy::log;
  NonfinitePolicy on_nonfinite = NonfinitePolicy::skip;
  int64_t max_rollbacks = 3;    ///< of one run without a new checkpoint; then it ends
  double explosion_rise = 0.0;  ///< above its lowest, of the loss, at which a stability test ends; 0: none
  bool operator==(const HealthConfig&) const = default;
};

/// What is written down about a run while it trains, beside loss and speed.
struct MetricsConfig {
  int64_t gradient_norms_every = 10;  ///< updates between records of each parameter's gradient; 0: none
  int64_t distributions_every = 100;  ///< updates between records of learned scales' distributions; 0: none
  bool tensorboard = true;            ///< event files for TensorBoard
  bool operator==(const MetricsConfig&) const = default;
};

/// The machine a rank uses.
struct DeviceConfig {
  DeviceChoice kind = DeviceChoice::cpu;
  int64_t threads = 0;  ///< threads of one rank; 0 means the cores of the host shared by the ranks on it
  bool tf32 = false;    ///< on GPUs: fp32 products round their factors to TF32
  bool tune_products = true;  ///< on GPUs: time cuBLASLt's algorithms once and keep the fastest
  bool cuda_graphs = false;   ///< on GPUs: each pass of a micro-batch is given to the GPU as one CUDA graph
  GpuTransport transport = GpuTransport::automatic;
  bool operator==(const DeviceConfig&) const = default;
};

/// Everything that a run needs, typed. Sections of the TOML file bear the members' names; no run needs a
/// flag.
struct RunConfig {
  ModelConfig model;
  ParallelConfig parallel;
  DataConfig data;
  OptimizerConfig optimizer;
  TrainConfig train;
  CheckpointConfig checkpoint;
  HealthConfig health;
  MetricsConfig metrics;
  DeviceConfig device;
  bool operator==(const RunConfig&) const = default;
};

/// Reads a TOML file of at most 1 MiB and then applies overrides in order: "section.key=value", whose values
/// are TOML (strings may go unquoted), or "@FILE", a TOML file whose keys replace those read before. Throws
/// ConfigError naming file, line and key for anything unknown (with the nearest known key), mistyped or out
/// of range, and for combinations that no run can have. Checks nothing that needs the number of ranks or the
/// corpus.
RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides);

/// As load_run_config, from text and without files of overrides; `name` stands for the file in messages.
RunConfig parse_run_config(const std::string& text, const std::string& name,
                           const std::vector<std::string>& overrides);

/// The whole configuration as TOML, every key written out: what is printed at the start and saved with the
/// run. parse_run_config(to_toml(c)) == c.
std::string to_toml(const RunConfig& config);

/// The value of one key, "section.key", as to_toml writes it. LogicError where there is no such key.
std::string toml_value(const RunConfig& config, const std::string& key);

/// What a resumed run may do with a key: have the checkpoint's value only; have another, which is told; or
/// have another, which changes nothing that it computes.
enum class ResumePolicy { must_equal, told, irrelevant };

/// One key of the configuration, as documentation shows it.
struct ConfigKey {
  std::string name;           ///< "section.key"
  std::string kind;           ///< what may be written: "an integer of at least 1"
  std::string default_value;  ///< as TOML
  std::string doc;            ///< what it means
  ResumePolicy on_resume = ResumePolicy::told;
};

/// Every key that a configuration has, in the order of to_toml.
std::vector<ConfigKey> config_keys();

/// config_keys() as text for a terminal: name and default, meaning, and what may be written.
std::string describe_config_keys();

/// Throws ConfigError where the configuration cannot run on `world` ranks, naming layouts of this model that
/// would. Fills in parallel.data and model.ffn; returns the completed configuration.
RunConfig resolve_layout(RunConfig config, int64_t world);

/// As resolve_layout, but where the degrees do not fit `world` ranks the nearest ones that do are taken: for
/// using a trained model on other ranks than it was trained on. ConfigError where none fit.
RunConfig nearest_layout(RunConfig config, int64_t world);

}  // namespace normformer
