#include "normformer/ops/embedding.h"

#include <cmath>
#include <vector>

#include "normformer/tensor/dispatch.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void embedding_forward(Context& context, const Tensor& tokens, const Tensor& weight, int64_t first_row,
                       const Tensor& out) {
  constexpr std::string_view kName = "embedding_forward";
  const Shape shape = matrix_shape(kName, "out", out);
  const Shape table = matrix_shape(kName, "weight", weight);
  Arguments arguments(context, kName, out.dtype());
  arguments.check("tokens", tokens, {shape[0]}, DType::i32);
  arguments.model("out", out, shape, 2);  // rows are read and written; the rest of the table is not touched
  const int64_t bytes = arguments.bytes();
  arguments.model("weight", weight, {table[0], shape[1]});
  context.costs().record(kName, 0, bytes);
  if (context.is_meta() || out.numel() == 0) return;
  NF_ON_DEVICE(embedding_forward, context, tokens, weight, first_row, out);
}

void embedding_backward(Context& context, const Tensor& tokens, const Tensor& dout, double factor,
                        int64_t first_row, const Tensor& dweight) {
  constexpr std::string_view kName = "embedding_backward";
  const Shape shape = matrix_shape(kName, "dout", dout);
  const Shape table = matrix_shape(kName, "dweight", dweight);
  Arguments arguments(context, kName, dout.dtype());
  arguments.check("tokens", tokens, {shape[0]}, DType::i32);
  arguments.model("dout", dout, shape);
  const int64_t bytes = arguments.bytes() + 2 * dout.numel() * size_of(accumulator_of(dout.dtype()));
  arguments.accumulator("dweight", dweight, {table[0], shape[1]});
  context.costs().record(kName, 2 * dout.numel(), bytes);
  if (context.is_meta() || dout.numel() == 0) return;
  NF_ON_DEVICE(embedding_backward, context, tokens, dout, factor, first_row, dweight);
}

void add_positions_forward(Context& context, const Tensor& embedded, double factor, const Tensor& positions,
                           int64_t first_row, const Dropout& dropout, const Tensor& out) {
  constexpr std::string_view kName = "add_positions_forward";
  const Shape shape = matrix_shape(kName, "embedded", embedded);
  const Shape table = matrix_shape(kName, "positions", positions);
  Arguments arguments(context, kName, embedded.dtype());
  arguments.model("embedded", embedded, shape);
  arguments.model("positions", positions, {table[0], shape[1]});
  arguments.model("out", out, shape);
  NF_CHECK(first_row >= 0 && (table[0] > 0 || shape[0] == 0), "{}: no positions", kName);
  check_dropout(kName, dropout);
  context.costs().record(kName, 3 * embedded.numel(), arguments.bytes());
  if (context.is_meta() || embedded.numel() == 0) return;
  NF_ON_DEVICE(add_positions_forward, context, embedded, factor, positions, first_row, dropout, out);
}

void add_positions_backward(Context& context, const Tensor& dout, int64_t length, int64_t first_row,
                            const Dropout& dropout, const Tensor& dsum, const Tensor& dpositions) {
  constexpr std::string_view kName = "add_positions_backward";
  const Shape shape = matrix_shape(kName, "dout", dout);
  Arguments arguments(context, kName, dout.dtype());
  arguments.model("dout", dout, shape);
  arguments.model("dsum", dsum, shape);
  if (dpositions) arguments.accumulator("dpositions", dpositions, {length, shape[1]}, 2);
  NF_CHECK(length > 0 && first_row >= 0, "{}: sequences of {} tokens", kName, length);
  check_dropout(kName, dropout);
  context.costs().record(kName, 2 * dout.numel(), arguments.bytes());
  if (context.is_meta() || dout.numel() == 0) return;
  NF_ON_DEVICE(add_positions_backward, context, dout, length, first_row, dropout, dsum, dpositions);
}

Tensor sinusoidal_positions(Context& context, int64_t length, int64_t width, DType dtype) {
  NF_CHECK(length >= 0 && width >= 4,
           "sinusoidal positions for {} tokens of {} channels; at least 4 are needed", length, width);
  const Tensor table = context.empty({length, width}, dtype, MemoryUse::parameters);
  context.costs().record("sinusoidal_positions", 0, table.nbytes());
  if (context.is_meta() || length == 0) return table;
  const int64_t half = width / 2;
  dispatch_floating(dtype, [&]<class T>() {
    std::vector<T> values(static_cast<size_t>(table.numel()));
    T* out = values.data();
    for (int64_t t = 0; t < length; ++t, out += width) {
      const auto position = static_cast<double>(t + 2);
      for (int64_t i = 0; i < half; ++i) {
        const double frequency =
            std::exp(-static_cast<double>(i) * std::log(10000.0) / static_cast<double>(half - 1));
        out[i] = T(static_cast<Accumulator<T>>(std::sin(position * frequency)));
        out[half + i] = T(static_cast<Accumulator<T>>(std::cos(position * frequency)));
      }
      if (width % 2 == 1) out[width - 1] = T{};
    }
    table.copy_in(values.data());
  });
  return table;
}

}  // namespace normformer::ops
