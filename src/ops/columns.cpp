#include "normformer/ops/columns.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void copy_columns(Context& context, const Tensor& from, int64_t from_column, const Tensor& to,
                  int64_t to_column, int64_t columns) {
  constexpr std::string_view kName = "copy_columns";
  const Shape source = matrix_shape(kName, "from", from);
  const Shape target = matrix_shape(kName, "to", to);
  NF_CHECK(columns >= 0 && from_column >= 0 && from_column + columns <= source[1] && to_column >= 0 &&
               to_column + columns <= target[1],
           "{}: {} columns from {} of {} to {} of {}", kName, columns, from_column, source[1], to_column,
           target[1]);
  Arguments arguments(context, kName, to.dtype());
  arguments.model("to", to, {source[0], target[1]});
  const bool narrows = from.dtype() != to.dtype();
  arguments.check("from", from, source, narrows ? accumulator_of(to.dtype()) : to.dtype());
  const int64_t moved = checked_mul(source[0], columns);
  context.costs().record(kName, 0, moved * (size_of(from.dtype()) + size_of(to.dtype())));
  if (context.is_meta() || moved == 0) return;
  NF_ON_DEVICE(copy_columns, context, from, from_column, to, to_column, columns);
}

}  // namespace normformer::ops
