#include "normformer/model/qkv_norm.h"

#include "normformer/ops/columns.h"
#include "normformer/ops/ffn_norm.h"

namespace normformer {

namespace {

constexpr std::array<const char*, 3> kNames = {"self_attn.q_ln", "self_attn.k_ln", "self_attn.v_ln"};

// Of three stacked tensors [3, N, ...] the one of queries, keys or values.
Tensor slice(const Tensor& all, size_t which, const Shape& shape) {
  const int64_t size = all.numel() / 3;
  return all.flat(static_cast<int64_t>(which) * size, size).view(shape);
}

}  // namespace

void QkvNorm::declare(const ParameterDeclarer& declare) {
  const int64_t width = environment_.config.width;
  const Range channels = environment_.head_channels();
  for (size_t i = 0; i < norms_.size(); ++i) {
    const std::string name = kNames[i];
    norms_[i].gamma = &declare.sharded_vector(name + ".weight", width, channels, InitialValue::constant(1.0));
    norms_[i].beta = &declare.sharded_vector(name + ".bias", width, channels, InitialValue::constant(0.0));
  }
}

// Room for two sums of each token and part.
Tensor QkvNorm::sums_of_tokens(int64_t tokens) const {
  return environment_.context->empty({3, tokens, 2}, accumulator_of(environment_.dtype));
}

Tensor QkvNorm::forward(const Tensor& qkv, Saved& saved) const {
  Context& context = *environment_.context;
  const DType accumulator = accumulator_of(environment_.dtype);
  const int64_t tokens = qkv.dim(0);
  const int64_t channels = qkv.dim(1) / 3;
  const Tensor sums = sums_of_tokens(tokens);
  for (size_t i = 0; i < norms_.size(); ++i) {
    saved.inputs[i] = context.empty({tokens, channels}, qkv.dtype());
    ops::copy_columns(context, qkv, static_cast<int64_t>(i) * channels, saved.inputs[i], 0, channels);
    ops::feature_sums(context, saved.inputs[i], slice(sums, i, {tokens, 2}));
  }
  environment_.tensor.all_reduce(context, sums, ReduceOp::sum);
  saved.mean = context.empty({3, tokens}, accumulator);
  saved.rstd = context.empty({3, tokens}, accumulator);
  ops::norm_statistics(context, sums.view({3 * tokens, 2}), environment_.config.width,
                       environment_.config.norm_eps, saved.mean.view({3 * tokens}),
                       saved.rstd.view({3 * tokens}));
  const Tensor normed = context.empty(qkv.shape(), qkv.dtype());
  const Tensor part = context.empty({tokens, channels}, qkv.dtype());
  for (size_t i = 0; i < norms_.size(); ++i) {
    ops::normalise(context, saved.inputs[i], slice(saved.mean, i, {tokens}), slice(saved.rstd, i, {tokens}),
                   norms_[i].gamma->value, norms_[i].beta->value, part);
    ops::copy_columns(context, part, 0, normed, static_cast<int64_t>(i) * channels, channels);
  }
  return normed;
}

void QkvNorm::backward(const Tensor& dnormed, Saved& saved) const {
  Context& context = *environment_.context;
  const int64_t tokens = dnormed.dim(0);
  const int64_t channels = dnormed.dim(1) / 3;
  const Tensor means = sums_of_tokens(tokens);
  std::array<Tensor, 3> gradients;
  for (size_t i = 0; i < norms_.size(); ++i) {
    gradients[i] = context.empty({tokens, channels}, dnormed.dtype());
    ops::copy_columns(context, dnormed, static_cast<int64_t>(i) * channels, gradients[i], 0, channels);
    ops::normalise_backward_sums(context, gradients[i], saved.inputs[i], slice(saved.mean, i, {tokens}),
                                 slice(saved.rstd, i, {tokens}), norms_[i].gamma->value,
                                 slice(means, i, {tokens, 2}));
  }
  environment_.tensor.all_reduce(context, means, ReduceOp::sum);
  scale(context, means, 1.0 / static_cast<double>(environment_.config.width));
  for (size_t i = 0; i < norms_.size(); ++i) {
    ops::normalise_backward(context, gradients[i], saved.inputs[i], slice(saved.mean, i, {tokens}),
                            slice(saved.rstd, i, {tokens}), norms_[i].gamma->value,
                            slice(means, i, {tokens, 2}), gradients[i], norms_[i].gamma->gradient,
                            norms_[i].beta->gradient);
    ops::copy_columns(context, gradients[i], 0, dnormed, static_cast<int64_t>(i) * channels, channels);
  }
  saved = {};
}

}  // namespace normformer
