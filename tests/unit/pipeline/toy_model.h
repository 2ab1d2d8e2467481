#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "normformer/pipeline/stage.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// A model of integers: y = x W + b, part after part, and loss = sum of r * y. All values are small integers
/// in fp64, so every order of additions gives the same bits, and since the loss is linear in each single
/// parameter, loss(w + 1) - loss(w) is its gradient exactly.
struct ToyModel {
  static constexpr int64_t kWidth = 3;

  std::vector<int64_t> rows;                 ///< [micro_batch]: tokens
  std::vector<std::vector<double>> weights;  ///< [part]: W row by row, then b

  ToyModel(int64_t parts, std::vector<int64_t> tokens) : rows(std::move(tokens)) {
    for (int64_t g = 0; g < parts; ++g) {
      std::vector<double> w;
      for (int64_t i = 0; i < (kWidth + 1) * kWidth; ++i)
        w.push_back(static_cast<double>((g * 7 + i * i * 3 + i * g) % 5 - 2));
      weights.push_back(w);
    }
  }

  int64_t micro_batches() const { return static_cast<int64_t>(rows.size()); }
  int64_t parts() const { return static_cast<int64_t>(weights.size()); }
  static double input(int64_t m, int64_t t, int64_t j) {
    return static_cast<double>((m * 11 + t * 5 + j * 3) % 7 - 3);
  }
  static double loss_weight(int64_t m, int64_t t, int64_t j) {
    return static_cast<double>((m * 5 + t * 3 + j * 8) % 9 - 4);
  }

  /// The loss of one micro-batch by plain loops.
  double loss(int64_t m) const {
    double total = 0;
    for (int64_t t = 0; t < rows[static_cast<size_t>(m)]; ++t) {
      std::vector<double> x;
      for (int64_t j = 0; j < kWidth; ++j) x.push_back(input(m, t, j));
      for (const auto& w : weights) x = affine(w, x);
      for (int64_t j = 0; j < kWidth; ++j) total += loss_weight(m, t, j) * x[static_cast<size_t>(j)];
    }
    return total;
  }

  double loss() const {
    double total = 0;
    for (int64_t m = 0; m < micro_batches(); ++m) total += loss(m);
    return total;
  }

  /// Gradient of the loss with respect to a part's parameters, by differences.
  std::vector<double> gradient(int64_t part) const {
    ToyModel moved = *this;
    std::vector<double> result;
    for (double& w : moved.weights[static_cast<size_t>(part)]) {
      w += 1;
      result.push_back(moved.loss() - loss());
      w -= 1;
    }
    return result;
  }

  static std::vector<double> affine(const std::vector<double>& w, const std::vector<double>& x) {
    std::vector<double> y;
    for (int64_t j = 0; j < kWidth; ++j) {
      double sum = w[static_cast<size_t>(kWidth * kWidth + j)];
      for (int64_t i = 0; i < kWidth; ++i)
        sum += x[static_cast<size_t>(i)] * w[static_cast<size_t>(i * kWidth + j)];
      y.push_back(sum);
    }
    return y;
  }
};

/// One part of a ToyModel as the pipeline drives it, with an account of what it was asked.
class ToyStage : public Stage {
 public:
  ToyStage(Context& context, const ToyModel& model, int64_t part)
      : gradient(model.weights[static_cast<size_t>(part)].size(), 0.0),
        context_(context),
        model_(model),
        part_(part) {}

  double loss = 0;
  std::vector<double> gradient;         ///< as ToyModel::weights
  std::vector<int64_t> weight_order;    ///< micro-batches as their weight gradients came
  int64_t alive = 0;                    ///< saved states now
  std::function<void(int64_t)> before;  ///< called with the micro-batch before each forward, where set

  Shape boundary_shape(int64_t m) const override { return {rows(m), kWidth}; }
  DType boundary_dtype() const override { return DType::f64; }

  Tensor forward(int64_t m, const Tensor& input, std::unique_ptr<Saved>& saved) override {
    if (before) before(m);
    auto state = std::make_unique<State>(alive);
    state->input = is_first() ? first_input(m) : input;
    const Tensor output = context_.empty(boundary_shape(m), DType::f64);
    for (int64_t t = 0; t < rows(m); ++t) {
      const double* x = row(state->input, t);
      const auto y = ToyModel::affine(weights(), {x, x + kWidth});
      std::copy(y.begin(), y.end(), row(output, t));
    }
    saved = std::move(state);
    if (!is_last()) return output;
    for (int64_t t = 0; t < rows(m); ++t)
      for (int64_t j = 0; j < kWidth; ++j) loss += ToyModel::loss_weight(m, t, j) * row(output, t)[j];
    return {};
  }

  Tensor backward_input(int64_t m, Saved& saved, const Tensor& doutput) override {
    auto& state = static_cast<State&>(saved);
    state.doutput = is_last() ? last_gradient(m) : doutput;
    if (is_first()) return {};
    const Tensor dinput = context_.zeros(boundary_shape(m), DType::f64);
    for (int64_t t = 0; t < rows(m); ++t)
      for (int64_t i = 0; i < kWidth; ++i)
        for (int64_t j = 0; j < kWidth; ++j)
          row(dinput, t)[i] += row(state.doutput, t)[j] * weights()[static_cast<size_t>(i * kWidth + j)];
    return dinput;
  }

  void backward_weight(int64_t m, Saved& saved) override {
    const auto& state = static_cast<State&>(saved);
    weight_order.push_back(m);
    for (int64_t t = 0; t < rows(m); ++t)
      for (int64_t j = 0; j < kWidth; ++j) {
        const double dy = row(state.doutput, t)[j];
        for (int64_t i = 0; i < kWidth; ++i)
          gradient[static_cast<size_t>(i * kWidth + j)] += row(state.input, t)[i] * dy;
        gradient[static_cast<size_t>(kWidth * kWidth + j)] += dy;
      }
  }

  Tensor backward(int64_t m, Saved& saved, const Tensor& doutput) override {
    Tensor dinput = backward_input(m, saved, doutput);
    backward_weight(m, saved);
    return dinput;
  }

 private:
  static constexpr int64_t kWidth = ToyModel::kWidth;

  struct State : Saved {
    explicit State(int64_t& counter) : alive(counter) { ++alive; }
    ~State() override { --alive; }
    int64_t& alive;
    Tensor input;
    Tensor doutput;
  };

  bool is_first() const { return part_ == 0; }
  bool is_last() const { return part_ == model_.parts() - 1; }
  int64_t rows(int64_t m) const { return model_.rows[static_cast<size_t>(m)]; }
  const std::vector<double>& weights() const { return model_.weights[static_cast<size_t>(part_)]; }
  static double* row(const Tensor& tensor, int64_t t) { return tensor.data<double>() + t * kWidth; }

  Tensor first_input(int64_t m) const {
    const Tensor x = context_.empty(boundary_shape(m), DType::f64);
    for (int64_t t = 0; t < rows(m); ++t)
      for (int64_t j = 0; j < kWidth; ++j) row(x, t)[j] = ToyModel::input(m, t, j);
    return x;
  }

  Tensor last_gradient(int64_t m) const {
    const Tensor dy = context_.empty(boundary_shape(m), DType::f64);
    for (int64_t t = 0; t < rows(m); ++t)
      for (int64_t j = 0; j < kWidth; ++j) row(dy, t)[j] = ToyModel::loss_weight(m, t, j);
    return dy;
  }

  Context& context_;
  const ToyModel& model_;
  int64_t part_;
};

/// The same part going forward only.
class ToyForwardStage : public ForwardStage {
 public:
  ToyForwardStage(Context& context, const ToyModel& model, int64_t part) : stage_(context, model, part) {}

  Tensor forward(int64_t m, const Tensor& input) override {
    std::unique_ptr<Stage::Saved> dropped;
    return stage_.forward(m, input, dropped);
  }
  Shape boundary_shape(int64_t m) const override { return stage_.boundary_shape(m); }
  DType boundary_dtype() const override { return stage_.boundary_dtype(); }
  double loss() const { return stage_.loss; }

 private:
  ToyStage stage_;
};

}  // namespace normformer
