#include "normformer/ops/attention.h"

#include "normformer/core/checked.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

// Shapes that both directions share.
struct Extents {
  int64_t tokens;
  int64_t channels;
  Shape lse;
};

Extents check_shape(const AttentionShape& s, const Tensor& qkv, const Dropout& dropout) {
  NF_CHECK(s.batch >= 0 && s.length >= 0 && s.heads >= 1 && s.head_size >= 1 && s.first_head >= 0,
           "attention: batch {}, length {}, heads {} from {}, size {}", s.batch, s.length, s.heads,
           s.first_head, s.head_size);
  NF_CHECK(qkv.defined(), "attention: qkv is undefined");
  NF_CHECK(dropout.probability >= 0.0 && dropout.probability < 1.0, "attention: a dropout of {}",
           dropout.probability);
  return {checked_mul(s.batch, s.length), checked_mul(s.heads, s.head_size), {s.batch, s.heads, s.length}};
}

// Every token must have something to attend to.
void check_document_starts(const AttentionShape& s, const Tensor& document_start) {
  // On a GPU a look would mean to wait for it.
  if (!document_start || document_start.device() == DeviceKind::cuda) return;
  const int32_t* starts = document_start.data<int32_t>();
  for (int64_t i = 0; i < document_start.numel(); ++i) {
    const int64_t token = i % s.length;
    NF_CHECK(starts[i] >= 0 && starts[i] <= (s.causal ? token : s.length - 1),
             "attention: the document of token {} starts at {}", token, starts[i]);
  }
}

}  // namespace

std::string to_string(const AttentionShape& shape) {
  return fmt::format("{} x {} tokens, {} heads of {}{}", shape.batch, shape.length, shape.heads,
                     shape.head_size, shape.causal ? ", causal" : "");
}

int64_t attention_forward_flops(const AttentionShape& s) {
  const int64_t pairs =
      s.causal ? checked_mul(s.length, checked_add(s.length, 1)) / 2 : checked_mul(s.length, s.length);
  return checked_mul(checked_mul(4 * s.head_size, checked_mul(s.batch, s.heads)), pairs);
}

void attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                       const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                       const Tensor& lse) {
  constexpr std::string_view kName = "attention_forward";
  const Extents extents = check_shape(shape, qkv, dropout);
  Arguments arguments(context, kName, qkv.dtype());
  arguments.model("qkv", qkv, {extents.tokens, 3 * extents.channels});
  arguments.model("out", out, {extents.tokens, extents.channels});
  arguments.accumulator("lse", lse, extents.lse);
  if (document_start) arguments.check("document_start", document_start, {extents.tokens}, DType::i32);
  context.costs().record(kName, attention_forward_flops(shape), arguments.bytes());
  if (context.is_meta() || qkv.numel() == 0) return;
  check_document_starts(shape, document_start);
  NF_ON_DEVICE(attention_forward, context, shape, qkv, document_start, dropout, out, lse);
}

void attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                        const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                        const Tensor& lse, const Tensor& dqkv) {
  constexpr std::string_view kName = "attention_backward";
  const Extents extents = check_shape(shape, qkv, dropout);
  Arguments arguments(context, kName, qkv.dtype());
  arguments.model("dout", dout, {extents.tokens, extents.channels});
  arguments.model("qkv", qkv, {extents.tokens, 3 * extents.channels});
  arguments.model("out", out, {extents.tokens, extents.channels});
  arguments.accumulator("lse", lse, extents.lse);
  arguments.model("dqkv", dqkv, {extents.tokens, 3 * extents.channels});
  if (document_start) arguments.check("document_start", document_start, {extents.tokens}, DType::i32);
  context.costs().record(kName, attention_forward_flops(shape) / 2 * 5, arguments.bytes());
  const Tensor workspace = context.empty(NF_ON_DEVICE(attention_backward_workspace, context, shape),
                                         accumulator_of(qkv.dtype()), MemoryUse::workspace);
  if (context.is_meta() || qkv.numel() == 0) return;
  check_document_starts(shape, document_start);
  NF_ON_DEVICE(attention_backward, context, shape, dout, qkv, document_start, dropout, out, lse, dqkv,
               workspace);
}

}  // namespace normformer::ops
