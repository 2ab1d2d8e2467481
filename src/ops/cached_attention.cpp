#include "normformer/ops/cached_attention.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

// Sizes that both operations share.
struct Extents {
  int64_t tokens;
  int64_t channels;
};

Extents check_cache(Arguments& arguments, std::string_view operation, const Tensor& qkv, const Tensor& slots,
                    const Tensor& positions, const Tensor& keys, const Tensor& values) {
  NF_CHECK(
      keys.defined() && keys.shape().rank() == 4 && keys.dim(1) > 0 && keys.dim(2) > 0 && keys.dim(3) > 0,
      "{}: keys is {}, not a cache", operation, keys.defined() ? to_string(keys) : "undefined");
  const Extents extents{matrix_shape(operation, "qkv", qkv)[0], checked_mul(keys.dim(2), keys.dim(3))};
  arguments.model("qkv", qkv, {extents.tokens, checked_mul(3, extents.channels)});
  arguments.check("slots", slots, {extents.tokens}, DType::i32);
  arguments.check("positions", positions, {extents.tokens}, DType::i32);
  arguments.model("keys", keys, keys.shape(), 0);
  arguments.model("values", values, keys.shape(), 0);
  return extents;
}

void check_places(std::string_view operation, const Tensor& slots, const Tensor& positions,
                  const Tensor& keys) {
  // On a GPU a look would mean to wait for it.
  if (slots.device() == DeviceKind::cuda) return;
  const int32_t* slot = slots.data<int32_t>();
  const int32_t* position = positions.data<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i) {
    NF_CHECK(slot[i] >= 0 && slot[i] < keys.dim(0) && position[i] >= 0 && position[i] < keys.dim(1),
             "{}: token {} is at {} of sequence {}, in a cache of {} tokens of {}", operation, i, position[i],
             slot[i], keys.dim(1), keys.dim(0));
  }
}

}  // namespace

void store_keys_and_values(Context& context, const Tensor& qkv, const Tensor& slots, const Tensor& positions,
                           const Tensor& keys, const Tensor& values) {
  constexpr std::string_view kName = "store_keys_and_values";
  Arguments arguments(context, kName, qkv.dtype());
  const Extents extents = check_cache(arguments, kName, qkv, slots, positions, keys, values);
  const int64_t moved = checked_mul(4 * size_of(qkv.dtype()), checked_mul(extents.tokens, extents.channels));
  context.costs().record(kName, 0, moved + slots.nbytes() + positions.nbytes());
  if (context.is_meta() || qkv.numel() == 0) return;
  check_places(kName, slots, positions, keys);
  NF_ON_DEVICE(store_keys_and_values, context, qkv, slots, positions, keys, values);
}

void cached_attention_forward(Context& context, const Tensor& qkv, const Tensor& slots,
                              const Tensor& positions, const Tensor& keys, const Tensor& values,
                              const Tensor& out) {
  constexpr std::string_view kName = "cached_attention_forward";
  Arguments arguments(context, kName, qkv.dtype());
  const Extents extents = check_cache(arguments, kName, qkv, slots, positions, keys, values);
  arguments.model("out", out, {extents.tokens, extents.channels});
  const int64_t read = checked_mul(checked_mul(extents.tokens, extents.channels), keys.dim(1));
  context.costs().record(kName, checked_mul(4, read),
                         arguments.bytes() + checked_mul(2 * size_of(qkv.dtype()), read));
  if (context.is_meta() || qkv.numel() == 0) return;
  check_places(kName, slots, positions, keys);
  NF_ON_DEVICE(cached_attention_forward, context, qkv, slots, positions, keys, values, out);
}

}  // namespace normformer::ops
