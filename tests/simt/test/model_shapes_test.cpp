// Every launch of a training step of the paper's four sizes keeps within a GPU's limits: the emulator is
// asked to check each launch, and to compute nothing.

#include <gtest/gtest.h>

#include "normformer/comm/group.h"
#include "normformer/training/trainer.h"

#include "simt/control.h"

namespace normformer {
namespace {

struct Size {
  const char* name;
  int64_t layers;
  int64_t width;
  int64_t heads;
};

constexpr Size kSizes[] = {
    {"125M", 12, 768, 12}, {"355M", 24, 1024, 16}, {"1.3B", 24, 2048, 32}, {"2.7B", 32, 2560, 32}};

class DryRun {
 public:
  DryRun() {
    simt::set_dry_run(true);
    simt::reset_launches();
  }
  ~DryRun() { simt::set_dry_run(false); }
};

RunConfig config_of(const Size& size, bool normformer, int64_t length, int64_t micro_batch) {
  RunConfig c;
  c.model.layers = size.layers;
  c.model.width = size.width;
  c.model.heads = size.heads;
  c.model.vocab = 51200;
  c.model.length = length;
  c.model.residual_dropout = 0.1;
  c.model.attention_dropout = 0.1;
  if (normformer) {
    c.model.head_scale = HeadScale::paper;
    c.model.post_attention_norm = true;
    c.model.ffn_norm = true;
    c.model.residual_scale = true;
  }
  c.train.global_batch = micro_batch;
  c.train.micro_batch = micro_batch;
  c.train.precision = Precision::bf16;
  return resolve_layout(c, 1);
}

Batch batch_of(const RunConfig& config, int64_t sequences) {
  const auto tokens = static_cast<size_t>(sequences * config.model.length);
  return {.sequences = sequences,
          .seq_len = config.model.length,
          .inputs = std::vector<int32_t>(tokens, 1),
          .targets = std::vector<int32_t>(tokens, 2),
          .document_start = {},
          .loss_mask = {}};
}

void run_step(const RunConfig& config) {
  Context context(DeviceKind::cuda);
  ModelInstance model(context, Mesh(make_self_world(), {}), config, true);
  Trainer trainer(model, config, [&](int64_t, int64_t n) { return batch_of(config, n); });
  trainer.initialise();
  trainer.step();
  context.gpu().synchronize();
}

TEST(ModelShapes, EveryLaunchOfAStepIsLegal) {
  for (const Size& size : kSizes) {
    for (const bool normformer : {false, true}) {
      for (const int64_t micro_batch : {1, 16}) {
        SCOPED_TRACE(std::string(size.name) + (normformer ? " NormFormer" : " baseline"));
        const DryRun dry;
        run_step(config_of(size, normformer, 2048, micro_batch));
        const simt::Launches launches = simt::launches();
        EXPECT_GT(launches.all.count, 20 * size.layers);
        EXPECT_LE(launches.all.most_blocks, (int64_t{1} << 31) - 1);
      }
    }
  }
}

}  // namespace
}  // namespace normformer
