#include "normformer/ops/random_fill.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

/// LogicError unless `tensor` can hold `part`. Whether there is anything to fill.
bool check_fill(Context& context, std::string_view operation, const Tensor& tensor, const Rectangle& part) {
  NF_CHECK(tensor.defined(), "{}: the tensor is undefined", operation);
  Arguments arguments(context, operation, tensor.dtype());
  arguments.model("the tensor", tensor, tensor.shape());
  const Range whole_rows{0, part.global_rows};
  const Range whole_columns{0, part.global_columns};
  NF_CHECK(tensor.numel() == part.numel() && intersect(part.rows, whole_rows) == part.rows &&
               intersect(part.columns, whole_columns) == part.columns,
           "{}: {} for rows {}..{} and columns {}..{} of {} x {}", operation, to_string(tensor),
           part.rows.begin, part.rows.end, part.columns.begin, part.columns.end, part.global_rows,
           part.global_columns);
  context.costs().record(operation, 0, arguments.bytes());
  return !context.is_meta() && tensor.numel() > 0;
}

}  // namespace

void fill_normal(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                 double std) {
  if (!check_fill(context, "fill_normal", tensor, part)) return;
  NF_ON_DEVICE(fill_normal, context, tensor, part, stream, std);
}

void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound) {
  if (!check_fill(context, "fill_uniform", tensor, part)) return;
  NF_ON_DEVICE(fill_uniform, context, tensor, part, stream, bound);
}

void fill_constant(Context& context, const Tensor& tensor, double value) {
  NF_CHECK(tensor.defined(), "fill_constant: the tensor is undefined");
  const Rectangle whole{{0, tensor.numel()}, {0, 1}, tensor.numel(), 1};
  if (!check_fill(context, "fill_constant", tensor, whole)) return;
  NF_ON_DEVICE(fill_constant, context, tensor, value);
}

}  // namespace normformer::ops
