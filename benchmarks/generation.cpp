// Continuing texts with a 125M model and a key-value cache: tokens a second, as a ratio to a whole pass for
// every token, and the rate at which weights and cache are read, against that at which this machine reads
// memory: all measured in turns, in the same run.
//
//   bench_generation [--threads 2] [--layers 12] [--dtype fp32|bf16] [--prompt 256] [--tokens 32]
//                    [--batches 1,8] [--rounds 3]

#include "normformer/evaluation/generation.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "normformer/ops/matmul.h"
#include "normformer/ops/random_fill.h"

#include "best_time.h"

namespace {

using namespace normformer;
using benchmarks::Clock;

struct Options {
  int threads = 2;
  int64_t layers = 12;
  std::string dtype = "fp32";
  int64_t prompt = 256;
  int64_t tokens = 32;
  std::vector<int64_t> batches = {1, 8};
  int rounds = 3;
};

RunConfig make_config(const Options& options) {
  RunConfig c;
  c.model.layers = options.layers;
  c.model.width = 768;
  c.model.heads = 12;
  c.model.ffn = 3072;
  c.model.vocab = 51200;
  c.model.length = 1024;
  c.model.head_scale = HeadScale::paper;
  c.model.post_attention_norm = true;
  c.model.ffn_norm = true;
  c.train.precision = options.dtype == "bf16" ? Precision::bf16 : Precision::fp32;
  c.parallel.data = 1;
  return c;
}

int64_t fill_weights(Context& context, ModelInstance& model) {
  int64_t bytes = 0;
  for (const Parameter& p : model.store().parameters()) {
    const Rectangle& part = p.spec.part;
    ops::fill_normal(context, p.value.view({part.rows.size(), part.columns.size()}), part,
                     RandomStream{}.with(p.spec.name), 0.02);
    bytes += p.value.nbytes();
  }
  model.prepare();
  return bytes;
}

std::vector<int32_t> random_tokens(int64_t count, uint64_t number, int64_t vocab) {
  const RandomStream stream = RandomStream{number}.with("benchmark tokens");
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(
        static_cast<int32_t>(stream.u64(static_cast<uint64_t>(i)) % static_cast<uint64_t>(vocab)));
  }
  return tokens;
}

// The least seconds of each kind of work.
struct Times {
  double prefill = std::numeric_limits<double>::infinity();
  double token = std::numeric_limits<double>::infinity();  // of one pass: a token for each text
  double whole = std::numeric_limits<double>::infinity();  // the same without a cache
  double read = std::numeric_limits<double>::infinity();
};

class Measurement {
 public:
  Measurement(const Options& options, int64_t batch)
      : options_(options),
        config_(make_config(options)),
        batch_(batch),
        clock_(options.threads == 1 ? Clock::thread : Clock::wall),
        context_(DeviceKind::cpu, options.threads),
        model_(context_, Mesh(make_self_world(), {}), config_, false),
        weight_bytes_(fill_weights(context_, model_)),
        memory_(context_.zeros({weight_bytes_ / 4}, DType::f32)) {
    for (int64_t i = 0; i < batch; ++i)
      prompts_.push_back(random_tokens(options.prompt, static_cast<uint64_t>(i), config_.model.vocab));
  }

  void run() {
    for (int i = 0; i < options_.rounds; ++i) {
      generate_once();
      best_.whole = std::min(best_.whole, benchmarks::seconds_of(clock_, [&] { whole_pass(); }));
      for (int reading = 0; reading < kReadings; ++reading)
        best_.read = std::min(best_.read, benchmarks::seconds_of(clock_, [&] { read_memory(); }));
    }
  }

  void print() const {
    const auto texts = static_cast<double>(batch_);
    const double rate = static_cast<double>(weight_bytes_ + cache_bytes_read()) / best_.token;
    const double ceiling = static_cast<double>(memory_.nbytes()) / best_.read;
    std::printf("%5ld %11.0f %11.1f %11.2f %7.1f %11.1f %11.1f %7.3f\n", static_cast<long>(batch_),
                texts * static_cast<double>(options_.prompt) / best_.prefill, texts / best_.token,
                texts / best_.whole, best_.whole / best_.token, rate / 1e9, ceiling / 1e9, rate / ceiling);
    std::fflush(stdout);
  }

 private:
  static constexpr int kReadings = 8;  // of a round; short, and troubled by whoever else reads

  // Of a token in the middle.
  int64_t cache_bytes_read() const {
    const int64_t tokens = batch_ * (options_.prompt + options_.tokens / 2);
    return 2 * tokens * config_.model.layers * config_.model.width *
           size_of(model_dtype(config_.train.precision));
  }

  // The first token of each text costs the prompts, each further one a pass.
  void generate_once() {
    double last = benchmarks::now(clock_);
    int64_t tokens = 0;
    const auto grown = [&](const GeneratedText&) {
      if (++tokens % batch_ != 0) return;
      const double now = benchmarks::now(clock_);
      double& best = tokens == batch_ ? best_.prefill : best_.token;
      best = std::min(best, now - last);
      last = now;
    };
    generate(model_, prompts_, {.max_tokens = options_.tokens, .temperature = 0.0, .batch = batch_},
             {.grown = grown, .finished = {}});
  }

  void whole_pass() {
    std::vector<int32_t> tokens;
    for (const std::vector<int32_t>& prompt : prompts_)
      tokens.insert(tokens.end(), prompt.begin(), prompt.end());
    MicroBatch batch;
    batch.sequences = batch_;
    batch.length = options_.prompt;
    batch.part = SequencePart::whole(options_.prompt);
    batch.purpose = Purpose::generation;
    batch.tokens = from_host<int32_t>(context_, tokens, {static_cast<int64_t>(tokens.size())});
    model_.set_micro_batches({batch});
    model_.forward(1);
  }

  // All of it for a byte that is nowhere.
  void read_memory() {
    constexpr int64_t kGrain = 1 << 20;
    const auto* bytes = static_cast<const char*>(memory_.raw());
    context_.threads().parallel_for(memory_.nbytes(), kGrain, [&](int64_t begin, int64_t end) {
      const void* found = std::memchr(bytes + begin, 1, static_cast<size_t>(end - begin));
      NF_CHECK(found == nullptr, "zeros are not zeros");
    });
  }

  Options options_;
  RunConfig config_;
  int64_t batch_;
  Clock clock_;
  Context context_;
  ModelInstance model_;
  int64_t weight_bytes_;
  Tensor memory_;  // as much as the weights
  std::vector<std::vector<int32_t>> prompts_;
  Times best_;
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Generation with a key-value cache against whole passes and against reading memory"};
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--layers", options.layers)->capture_default_str();
  app.add_option("--dtype", options.dtype)->capture_default_str()->check(CLI::IsMember({"fp32", "bf16"}));
  app.add_option("--prompt", options.prompt)->capture_default_str()->check(CLI::Range(1, 1000));
  app.add_option("--tokens", options.tokens)->capture_default_str()->check(CLI::Range(2, 1000));
  app.add_option("--batches", options.batches)->delimiter(',')->capture_default_str();
  app.add_option("--rounds", options.rounds)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  std::printf("%s, %d threads, %ld layers of width 768, %s, prompts of %ld tokens\n",
              ops::describe_matmul().c_str(), options.threads, static_cast<long>(options.layers),
              options.dtype.c_str(), static_cast<long>(options.prompt));
  std::printf("texts  prefill/s    tokens/s  uncached/s   ratio   reads GB/s memory GB/s   share\n");
  for (const int64_t batch : options.batches) {
    Measurement measurement(options, batch);
    measurement.run();
    measurement.print();
  }
  return 0;
}
