// How near the element-wise operations come to the memory's bandwidth: bytes that each must move (its
// recorded cost) over its time, as a fraction of what a plain copy reaches here.
//
//   bench_ops_elementwise [--threads 1] [--device cpu|cuda] [--rows N] [--columns D ...] [--only
//   PART_OF_A_NAME]

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "normformer/ops/activation.h"
#include "normformer/ops/cross_entropy.h"
#include "normformer/ops/embedding.h"
#include "normformer/ops/ffn_norm.h"
#include "normformer/ops/head_scale.h"
#include "normformer/ops/layer_norm.h"
#include "normformer/ops/optimizer.h"
#include "normformer/ops/random_fill.h"
#include "normformer/ops/sublayer.h"

#include "best_time.h"

namespace normformer::ops {
namespace {

class Bench {
 public:
  Bench(DeviceKind device, int threads, std::string only, DType dtype, int64_t rows, int64_t columns)
      : context_(device, threads),
        only_(std::move(only)),
        dtype_(dtype),
        rows_(rows),
        columns_(columns),
        copied_from_(matrix()),
        copied_to_(matrix()) {}

  void run() {
    fmt::print("\n{} {} x {}\n", name_of(dtype_), rows_, columns_);
    norms();
    activations();
    sublayers();
    folded_norm();
    embeddings();
    losses();
    optimizers();
  }

 private:
  /// Numbers in (-1, 1), repeated: drawing every one would take longer than all that is measured.
  Tensor filled(const Shape& shape, DType dtype) {
    constexpr int64_t kDrawn = 1 << 16;
    const Tensor tensor = context_.empty(shape, dtype);
    const int64_t drawn = std::min(kDrawn, tensor.numel());
    const Tensor first = tensor.flat(0, drawn);
    fill_uniform(context_, first, {{0, drawn}, {0, 1}, drawn, 1}, RandomStream{}.with(1), 1.0);
    for (int64_t done = drawn; done < tensor.numel(); done += drawn) {
      const int64_t n = std::min(drawn, tensor.numel() - done);
      copy(context_, tensor.flat(0, n), tensor.flat(done, n));
    }
    return tensor;
  }
  Tensor matrix() { return filled({rows_, columns_}, dtype_); }
  Tensor row() { return filled({columns_}, dtype_); }
  Tensor row_sums() { return filled({columns_}, accumulator_of(dtype_)); }
  Tensor column() { return filled({rows_}, accumulator_of(dtype_)); }
  Dropout dropout(double probability) const {
    return {.probability = probability,
            .stream = RandomStream{}.with(1),
            .rows_per_sample = 1024,
            .row_elements = columns_};
  }

  void measure(const std::string& name, const std::function<void()>& call) {
    if (name.find(only_) == std::string::npos) return;
    context_.costs().clear();
    call();
    double bytes = 0.0;
    for (const auto& [operation, cost] : context_.costs().operations())
      bytes += static_cast<double>(cost.bytes);
    constexpr double kSeconds = 0.3;
    const bool alone = !context_.is_cuda() && context_.threads().size() == 1;
    const auto clock = alone ? benchmarks::Clock::thread : benchmarks::Clock::wall;
    auto best = benchmarks::best_times(
        clock, kSeconds, [&] { repeat(call); },
        [&] { repeat([&] { copy(context_, copied_from_, copied_to_); }); });
    best.ours /= calls_at_a_time();
    best.ceiling /= calls_at_a_time();
    const double rate = bytes / best.ours;
    const double copy_rate = 2.0 * static_cast<double>(copied_from_.nbytes()) / best.ceiling;
    fmt::print("  {:<36} {:8.2f} ms {:6.1f} GB/s, copy {:5.1f} GB/s: {:4.0f} %\n", name, best.ours * 1e3,
               rate * 1e-9, copy_rate * 1e-9, 100.0 * rate / copy_rate);
  }

  // A GPU starts a call while the one before it runs.
  int calls_at_a_time() const { return context_.is_cuda() ? 20 : 1; }
  void repeat(const std::function<void()>& call) {
    for (int i = 0; i < calls_at_a_time(); ++i) call();
    if (context_.is_cuda()) context_.gpu().synchronize();
  }
  // Heads of 64 columns where they divide them.
  int64_t heads() const { return columns_ % 64 == 0 ? columns_ / 64 : 1; }

  void norms() {
    const Tensor x = matrix(), y = matrix(), dy = matrix(), residual = matrix();
    const Tensor gamma = row(), beta = row(), mean = column(), rstd = column();
    const Tensor dgamma = row_sums(), dbeta = row_sums();
    measure("layer_norm_forward", [&] { layer_norm_forward(context_, x, gamma, beta, 1e-5, y, mean, rstd); });
    measure("layer_norm_backward",
            [&] { layer_norm_backward(context_, dy, x, gamma, mean, rstd, residual, y, dgamma, dbeta); });
    const Tensor scales = filled({heads()}, dtype_);
    const Tensor dscales = filled({heads()}, accumulator_of(dtype_));
    measure("head_scale_forward", [&] { head_scale_forward(context_, x, scales, y); });
    measure("head_scale_backward", [&] { head_scale_backward(context_, dy, x, scales, y, dscales); });
  }

  void activations() {
    const Tensor z = matrix(), out = matrix(), d = matrix();
    const Tensor bias = row(), gamma = row(), mean = column(), rstd = column();
    const Tensor sums = filled({rows_, 2}, accumulator_of(dtype_));
    const Tensor dbias = row_sums(), dgamma = row_sums(), dbeta = row_sums();
    const NormOfActivation norm{gamma, mean, rstd, mean, rstd, dgamma, dbeta};
    const std::pair<ActivationKind, const char*> kinds[] = {{ActivationKind::gelu, "gelu"},
                                                            {ActivationKind::gelu_tanh, "gelu_tanh"},
                                                            {ActivationKind::relu_squared, "relu_squared"}};
    for (const auto& [kind, name] : kinds) {
      measure(fmt::format("activation_forward {}", name),
              [&] { activation_forward(context_, kind, z, bias, dropout(0), Tensor(), out, Tensor()); });
      measure(fmt::format("activation_backward {}", name),
              [&] { activation_backward(context_, kind, d, z, bias, dropout(0), nullptr, out, dbias); });
    }
    const auto gelu = ActivationKind::gelu;
    measure("activation_forward gelu, norm",
            [&] { activation_forward(context_, gelu, z, bias, dropout(0), gamma, out, sums); });
    measure("activation_backward gelu, norm",
            [&] { activation_backward(context_, gelu, d, z, bias, dropout(0), &norm, out, dbias); });
    measure("activation_forward gelu, dropout",
            [&] { activation_forward(context_, gelu, z, bias, dropout(0.1), Tensor(), out, Tensor()); });
  }

  void sublayers() {
    const Tensor branch = matrix(), residual = matrix(), out = matrix(), dout = matrix(), dbranch = matrix();
    const Tensor mean = column(), rstd = column();
    SublayerOutput parts;
    parts.bias = row();
    SublayerOutputGradients gradients;
    gradients.bias = row_sums();
    const NextNorm next{row(), row(), 1e-5, matrix(), column(), column()};
    const auto both = [&](const std::string& with) {
      measure("sublayer_output_forward " + with,
              [&] { sublayer_output_forward(context_, parts, branch, residual, out, mean, rstd); });
      measure("sublayer_output_forward " + with + ", next",
              [&] { sublayer_output_forward(context_, parts, branch, residual, out, mean, rstd, next); });
      const Tensor dresidual = parts.residual_scale ? out : Tensor();
      measure("sublayer_output_backward " + with, [&] {
        sublayer_output_backward(context_, parts, dout, branch, residual, mean, rstd, dbranch, dresidual,
                                 gradients);
      });
    };
    both("bias");
    parts.dropout = dropout(0.1);
    both("dropout");
    parts.dropout = {};
    parts.norm_gamma = row();
    parts.norm_beta = row();
    gradients.norm_gamma = row_sums();
    gradients.norm_beta = row_sums();
    both("norm");
    parts.dropout = dropout(0.1);
    parts.head_scale = filled({heads()}, dtype_);
    gradients.head_scale = filled({heads()}, accumulator_of(dtype_));
    parts.residual_scale = row();
    gradients.residual_scale = row_sums();
    both("all");
  }

  void folded_norm() {
    const Tensor z = matrix(), y = matrix(), dy = matrix();
    const Tensor mean = column(), rstd = column(), mean_g = column(), mean_gx = column();
    const Tensor c = row_sums(), w_beta = row_sums(), u = row_sums(), s = row_sums();
    const Tensor b2 = row(), gamma = row(), beta = row();
    const Tensor sums = filled({rows_, 2}, accumulator_of(dtype_));
    measure("unfold_norm", [&] { unfold_norm(context_, z, mean, rstd, c, w_beta, b2, y); });
    measure("fold_norm_backward", [&] {
      fold_norm_backward(context_, dy, y, mean, rstd, c, w_beta, b2, 4 * columns_, mean_g, mean_gx, z, u, s);
    });
    const Tensor w2 = filled({columns_, 4 * columns_}, dtype_);
    const Tensor wide = filled({4 * columns_}, dtype_);
    const Tensor dw = filled({columns_, 4 * columns_}, accumulator_of(dtype_));
    measure("fold_norm_weights", [&] { fold_norm_weights(context_, w2, wide, wide, c, w_beta); });
    measure("add_fold_correction", [&] { add_fold_correction(context_, u, wide, s, wide, dw); });
    measure("normalise", [&] { normalise(context_, z, mean, rstd, gamma, beta, y); });
    measure("normalise_backward_sums",
            [&] { normalise_backward_sums(context_, dy, y, mean, rstd, gamma, sums); });
  }

  void embeddings() {
    const int64_t vocabulary = 8192;
    std::vector<int32_t> ids;
    for (int64_t n = 0; n < rows_; ++n) ids.push_back(static_cast<int32_t>(n * 2654435761 % vocabulary));
    const Tensor tokens = from_host<int32_t>(context_, ids, {rows_});
    const Tensor weight = filled({vocabulary, columns_}, dtype_);
    const Tensor dweight = filled({vocabulary, columns_}, accumulator_of(dtype_));
    const Tensor positions = filled({1024, columns_}, dtype_);
    const Tensor dpositions = filled({1024, columns_}, accumulator_of(dtype_));
    const Tensor x = matrix(), out = matrix();
    measure("embedding_forward", [&] { embedding_forward(context_, tokens, weight, 0, out); });
    measure("embedding_backward", [&] { embedding_backward(context_, tokens, x, 1.0, 0, dweight); });
    measure("add_positions_forward",
            [&] { add_positions_forward(context_, x, 2.0, positions, 0, dropout(0), out); });
    measure("add_positions_forward dropout",
            [&] { add_positions_forward(context_, x, 2.0, positions, 0, dropout(0.1), out); });
    measure("add_positions_backward",
            [&] { add_positions_backward(context_, x, 1024, 0, dropout(0), out, dpositions); });
  }

  void losses() {
    const int64_t vocabulary = 51200;
    const int64_t tokens = std::max<int64_t>(1, rows_ * columns_ / vocabulary);
    const Tensor logits = filled({tokens, vocabulary}, dtype_);
    const Tensor maxima = filled({tokens}, accumulator_of(dtype_));
    const Tensor sums = filled({tokens, 2}, accumulator_of(dtype_));
    const Tensor targets = context_.zeros({tokens}, DType::i32);
    measure("logits_max", [&] { logits_max(context_, logits, maxima); });
    measure("logits_sums", [&] { logits_sums(context_, logits, maxima, targets, 0, sums); });
    measure("cross_entropy_backward",
            [&] { cross_entropy_backward(context_, logits, maxima, sums, targets, 0, Tensor(), 1.0); });
  }

  void optimizers() {
    const DType sums = accumulator_of(dtype_);
    const Shape shape{rows_ * columns_};
    const Tensor gradient = filled(shape, sums), master = filled(shape, sums), moment1 = filled(shape, sums);
    const Tensor moment2 = context_.zeros(shape, sums);
    const Tensor params = dtype_ == sums ? Tensor() : filled(shape, dtype_);
    measure("adamw", [&] {
      adamw(context_, AdamW{.lr = 1e-3, .weight_decay = 0.01}, gradient, master, moment1, moment2, params);
    });
    measure("absolute_max", [&] { absolute_max(context_, gradient); });
    measure("sum_of_squares", [&] { OrderFreeSumOfSquares(1.0).add(context_, gradient); });
  }

  Context context_;
  std::string only_;
  DType dtype_;
  int64_t rows_;
  int64_t columns_;
  Tensor copied_from_;
  Tensor copied_to_;
};

}  // namespace
}  // namespace normformer::ops

int main(int argc, char** argv) {
  using namespace normformer;
  CLI::App app{"Element-wise operations beside a copy"};
  int threads = 1;
  std::string only;
  std::string device = "cpu";
  int64_t rows = 0;
  std::vector<int64_t> columns;
  app.add_option("--threads", threads)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--device", device)->capture_default_str()->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--rows", rows, "tokens; 8192 on the CPU, 16384 on a GPU")->check(CLI::PositiveNumber);
  app.add_option("--columns", columns, "widths; those of 125M, on a GPU also 1.3B's and 2.7B's")
      ->check(CLI::PositiveNumber);
  app.add_option("--only", only, "operations whose name holds this");
  CLI11_PARSE(app, argc, argv);
  const bool cuda = device == "cuda";
  if (cuda && list_gpus().empty()) {
    fmt::print("skipped: no GPU ({})\n", describe_cuda());
    return 0;
  }
  if (rows == 0) rows = cuda ? 16384 : 8192;
  if (columns.empty())
    columns = cuda ? std::vector<int64_t>{768, 2048, 2560, 3072, 8192} : std::vector<int64_t>{768, 3072};
  for (const int64_t width : columns) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      ops::Bench(cuda ? DeviceKind::cuda : DeviceKind::cpu, threads, only, dtype, rows, width).run();
    }
  }
}
