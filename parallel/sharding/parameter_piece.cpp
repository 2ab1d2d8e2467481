#include "normformer/sharding/parameter_piece.h"

#include <cstring>
#include <map>
#include <sstream>
#include <vector>

namespace normformer {

namespace {

// What root knows of a piece that another rank holds.
struct RemotePiece {
  int rank;
  Rectangle part;
  Range range;
};
struct Assembly {
  Shape shape;
  std::vector<RemotePiece> pieces;
};

std::string describe(std::span<const ParameterPiece> pieces) {
  std::ostringstream text;
  for (const ParameterPiece& p : pieces) {
    const ParameterSpec& spec = p.parameter->spec;
    text << spec.name << ' ' << spec.logical_shape.rank() << ' ' << spec.part.rows.begin << ' '
         << spec.part.rows.end << ' ' << spec.part.columns.begin << ' ' << spec.part.columns.end << ' '
         << spec.part.global_rows << ' ' << spec.part.global_columns << ' ' << p.range.begin << ' '
         << p.range.end << '\n';
  }
  return text.str();
}

std::map<std::string, Assembly> read_descriptions(const std::vector<std::string>& texts) {
  std::map<std::string, Assembly> tensors;
  for (size_t rank = 0; rank < texts.size(); ++rank) {
    std::istringstream text(texts[rank]);
    std::string name;
    int dimensions = 0;
    RemotePiece piece{static_cast<int>(rank), {}, {}};
    Rectangle& r = piece.part;
    while (text >> name >> dimensions >> r.rows.begin >> r.rows.end >> r.columns.begin >> r.columns.end >>
           r.global_rows >> r.global_columns >> piece.range.begin >> piece.range.end) {
      Assembly& tensor = tensors[name];
      tensor.shape = dimensions == 1 ? Shape{r.global_rows} : Shape{r.global_rows, r.global_columns};
      tensor.pieces.push_back(piece);
    }
  }
  return tensors;
}

}  // namespace

void scatter_piece(const Rectangle& part, Range range, const Tensor& values, const Tensor& whole) {
  const int64_t item = size_of(values.dtype());
  const auto* from = static_cast<const std::byte*>(values.host_raw());
  auto* to = static_cast<std::byte*>(whole.host_raw());
  const int64_t columns = part.columns.size();
  for (int64_t at = range.begin; at < range.end;) {
    const int64_t row = at / columns;
    const int64_t column = at % columns;
    const int64_t run = std::min(range.end - at, columns - column);
    const int64_t place = (part.rows.begin + row) * part.global_columns + part.columns.begin + column;
    std::memcpy(to + place * item, from + (at - range.begin) * item, static_cast<size_t>(run * item));
    at += run;
  }
}

std::vector<LogicalTensor> list_logical(const Group& group, std::span<const ParameterPiece> mine) {
  std::vector<LogicalTensor> listed;
  for (const auto& [name, tensor] : read_descriptions(group.all_gather_text(describe(mine)))) {
    listed.push_back({name, tensor.shape});
  }
  return listed;
}

void gather_logical(Context& context, const Group& group, std::span<const ParameterPiece> mine, DType dtype,
                    int root,
                    const std::function<void(const std::string& name, const Tensor& whole)>& visit) {
  constexpr int kTag = 7;
  const auto tensors = read_descriptions(group.all_gather_text(describe(mine)));
  const bool is_root = group.rank() == root;
  Context& host = context.host();
  for (const auto& [name, tensor] : tensors) {
    const Tensor whole = is_root ? host.zeros(tensor.shape, dtype) : Tensor();
    for (const ParameterPiece& piece : mine) {
      if (piece.parameter->spec.name != name) continue;
      const Tensor values = on_host(context, piece.values);
      if (is_root)
        scatter_piece(piece.parameter->spec.part, piece.range, values, whole);
      else
        group.send(host, values, root, kTag).wait();
    }
    if (!is_root) continue;
    for (const RemotePiece& piece : tensor.pieces) {
      if (piece.rank == root) continue;
      const Tensor values = host.empty({piece.range.size()}, dtype);
      group.receive(host, values, piece.rank, kTag);
      scatter_piece(piece.part, piece.range, values, whole);
    }
    visit(name, whole);
  }
}

}  // namespace normformer
