#include "normformer/ops/partial_attention.h"

#include <algorithm>

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

// Rows and channels that both directions share.
struct Extents {
  int64_t queries;
  int64_t keys;
  int64_t channels;
  Shape lse;
};

bool fits(const SequencePart& part, int64_t length) {
  return 0 <= part.first.begin && part.first.begin <= part.first.end && part.first.end <= part.second.begin &&
         part.second.begin <= part.second.end && part.second.end <= length;
}

Extents check_shape(const PartialAttentionShape& s, const Tensor& qkv, const Dropout& dropout) {
  NF_CHECK(s.batch >= 0 && s.length >= 0 && s.heads >= 1 && s.head_size >= 1 && s.first_head >= 0,
           "partial attention: batch {}, length {}, heads {} from {}, size {}", s.batch, s.length, s.heads,
           s.first_head, s.head_size);
  NF_CHECK(fits(s.queries, s.length) && fits(s.keys, s.length),
           "partial attention: positions {}-{} and {}-{} attend to {}-{} and {}-{} of {}",
           s.queries.first.begin, s.queries.first.end, s.queries.second.begin, s.queries.second.end,
           s.keys.first.begin, s.keys.first.end, s.keys.second.begin, s.keys.second.end, s.length);
  NF_CHECK(qkv.defined(), "partial attention: qkv is undefined");
  NF_CHECK(dropout.probability >= 0.0 && dropout.probability < 1.0, "partial attention: a dropout of {}",
           dropout.probability);
  return {checked_mul(s.batch, s.queries.size()),
          checked_mul(s.batch, s.keys.size()),
          checked_mul(s.heads, s.head_size),
          {s.batch, s.heads, s.queries.size()}};
}

// Every token must have something to attend to in the whole sequence.
void check_document_starts(const PartialAttentionShape& s, const Tensor& document_start) {
  // On a GPU a look would mean to wait for it.
  if (!document_start || document_start.device() == DeviceKind::cuda) return;
  const int32_t* starts = document_start.data<int32_t>();
  for (int64_t i = 0; i < document_start.numel(); ++i) {
    const int64_t position = s.queries.position_of(i % s.queries.size());
    NF_CHECK(starts[i] >= 0 && starts[i] <= (s.causal ? position : s.length - 1),
             "partial attention: the document of the token at {} starts at {}", position, starts[i]);
  }
}

// Pairs of a query and a key of no later position.
int64_t visible_pairs(Range queries, Range keys) {
  const Range among = intersect(queries, keys);
  const int64_t first = among.begin + 1 - keys.begin;  // that the first of these queries sees
  const int64_t triangle = among.empty() ? 0 : checked_mul(among.size(), 2 * first + among.size() - 1) / 2;
  const int64_t behind = std::max<int64_t>(0, queries.end - std::max(queries.begin, keys.end));
  return checked_add(triangle, checked_mul(behind, keys.size()));
}

}  // namespace

std::string to_string(const PartialAttentionShape& shape) {
  return fmt::format("{} x {} of {} tokens to {}, {} heads of {}{}", shape.batch, shape.queries.size(),
                     shape.length, shape.keys.size(), shape.heads, shape.head_size,
                     shape.causal ? ", causal" : "");
}

int64_t partial_attention_forward_flops(const PartialAttentionShape& s) {
  int64_t pairs = 0;
  for (const Range queries : {s.queries.first, s.queries.second}) {
    for (const Range keys : {s.keys.first, s.keys.second})
      pairs = checked_add(pairs,
                          s.causal ? visible_pairs(queries, keys) : checked_mul(queries.size(), keys.size()));
  }
  return checked_mul(checked_mul(4 * s.head_size, checked_mul(s.batch, s.heads)), pairs);
}

void partial_attention_forward(Context& context, const PartialAttentionShape& shape, const Tensor& qkv,
                               const Tensor& kv, const Tensor& document_start, const Dropout& dropout,
                               const Tensor& out, const Tensor& lse) {
  constexpr std::string_view kName = "partial_attention_forward";
  const Extents extents = check_shape(shape, qkv, dropout);
  Arguments arguments(context, kName, qkv.dtype());
  arguments.model("qkv", qkv, {extents.queries, 3 * extents.channels});
  arguments.model("kv", kv, {extents.keys, 2 * extents.channels});
  arguments.accumulator("out", out, {extents.queries, extents.channels}, 2);
  arguments.accumulator("lse", lse, extents.lse, 2);
  if (document_start) arguments.check("document_start", document_start, {extents.queries}, DType::i32);
  context.costs().record(kName, partial_attention_forward_flops(shape), arguments.bytes());
  if (context.is_meta() || qkv.numel() == 0 || kv.numel() == 0) return;
  check_document_starts(shape, document_start);
  NF_ON_DEVICE(partial_attention_forward, context, shape, qkv, kv, document_start, dropout, out, lse);
}

void partial_attention_backward(Context& context, const PartialAttentionShape& shape, const Tensor& dout,
                                const Tensor& qkv, const Tensor& kv, const Tensor& document_start,
                                const Dropout& dropout, const Tensor& out, const Tensor& lse,
                                const Tensor& dq, const Tensor& dkv) {
  constexpr std::string_view kName = "partial_attention_backward";
  const Extents extents = check_shape(shape, qkv, dropout);
  Arguments arguments(context, kName, qkv.dtype());
  arguments.model("dout", dout, {extents.queries, extents.channels});
  arguments.model("qkv", qkv, {extents.queries, 3 * extents.channels});
  arguments.model("kv", kv, {extents.keys, 2 * extents.channels});
  arguments.model("out", out, {extents.queries, extents.channels});
  arguments.accumulator("lse", lse, extents.lse);
  arguments.accumulator("dq", dq, {extents.queries, extents.channels}, 2);
  arguments.accumulator("dkv", dkv, {extents.keys, 2 * extents.channels}, 2);
  if (document_start) arguments.check("document_start", document_start, {extents.queries}, DType::i32);
  context.costs().record(kName, partial_attention_forward_flops(shape) / 2 * 5, arguments.bytes());
  const Tensor workspace = context.empty(NF_ON_DEVICE(partial_attention_backward_workspace, context, shape),
                                         accumulator_of(qkv.dtype()), MemoryUse::workspace);
  if (context.is_meta() || qkv.numel() == 0 || kv.numel() == 0) return;
  check_document_starts(shape, document_start);
  NF_ON_DEVICE(partial_attention_backward, context, shape, dout, qkv, kv, document_start, dropout, out, lse,
               dq, dkv, workspace);
}

}  // namespace normformer::ops
