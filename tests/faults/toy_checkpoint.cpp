#include "toy_checkpoint.h"

#include <bit>
#include <string>

#include <fmt/format.h>

#include "normformer/tensor/dispatch.h"

namespace normformer {

namespace {

enum class Split { rows, columns, none };

struct ToyTensor {
  const char* name;
  int64_t rows;
  int64_t columns;
  Split split;
};

constexpr ToyTensor kTensors[] = {{"decoder.embed_tokens.weight", 37, 6, Split::rows},
                                  {"decoder.layers.0.fc1.bias", 13, 1, Split::rows},
                                  {"decoder.layers.0.fc1.weight", 13, 6, Split::rows},
                                  {"decoder.layers.0.fc2.weight", 6, 13, Split::columns},
                                  {"decoder.layers.0.w_resid", 7, 1, Split::none}};

DType type_of(Role role) { return role == Role::parameter ? DType::bf16 : DType::f32; }

/// Small integers, so that every type holds them.
double value_of(const TensorPiece& piece, int64_t row, int64_t column, int version) {
  uint64_t hash = static_cast<uint64_t>(piece.role) * 31 + static_cast<uint64_t>(version) * 17;
  for (const char c : piece.name) hash = hash * 131 + static_cast<uint64_t>(c);
  hash = (hash ^ static_cast<uint64_t>(row * 1000 + column)) * 0x9E3779B97F4A7C15u;
  return static_cast<double>(hash >> 57);
}

template <class Visit>
void for_each_element(const TensorPiece& piece, Visit&& visit) {
  dispatch_floating(piece.data.dtype(), [&]<class T>() {
    const int64_t width = piece.rectangle.columns.size();
    for (int64_t i = 0; i < piece.range.size(); ++i) {
      const int64_t index = piece.range.begin + i;
      visit(piece.data.data<T>()[i], piece.rectangle.rows.begin + index / width,
            piece.rectangle.columns.begin + index % width);
    }
  });
}

}  // namespace

std::vector<TensorPiece> toy_pieces(Context& context, ToyLayout layout, int64_t rank, int version,
                                    bool filled) {
  const int64_t tensor_rank = rank / layout.data;
  const int64_t data_rank = rank % layout.data;
  std::vector<TensorPiece> pieces;
  for (const Role role : {Role::parameter, Role::master, Role::moment1, Role::moment2}) {
    for (const ToyTensor& t : kTensors) {
      Rectangle part{{0, t.rows}, {0, t.columns}, t.rows, t.columns};
      if (t.split == Split::rows) part.rows = even_part(t.rows, layout.tensor, tensor_rank);
      if (t.split == Split::columns) part.columns = even_part(t.columns, layout.tensor, tensor_rank);
      if (t.split == Split::none && tensor_rank > 0) continue;
      const Range range = even_part(part.numel(), layout.data, data_rank);
      const Tensor data = context.empty({range.size()}, type_of(role));
      pieces.push_back({t.name, role, part, range, data});
      for_each_element(pieces.back(), [&]<class T>(T& x, int64_t row, int64_t column) {
        const double value = filled ? value_of(pieces.back(), row, column, version) : -1.0;
        x = static_cast<T>(static_cast<float>(value));
      });
    }
  }
  return pieces;
}

int64_t count_wrong(const std::vector<TensorPiece>& pieces, int version) {
  int64_t wrong = 0;
  for (const TensorPiece& piece : pieces) {
    for_each_element(piece, [&]<class T>(T& x, int64_t row, int64_t column) {
      wrong += static_cast<float>(x) != static_cast<float>(value_of(piece, row, column, version));
    });
  }
  return wrong;
}

CheckpointInfo toy_info(int version) {
  CheckpointInfo info;
  info.run_id = "toy";
  info.update_count = version;
  info.batch_index = version + 3;
  info.skipped_in_a_row = 2;
  info.tokens_seen = version * int64_t{10'000'000'000};
  info.consumed_samples = version * int64_t{64};
  info.seed = 0xFEDCBA9876543210u;
  info.config_toml = "[model]\nlayers = 1\n";
  info.tokenizer_hash = "0123456789abcdef";
  info.metrics = {{"loss", 2.5 + version}, {"gradient_norm", 0.125}};
  info.layout = {{"tensor", 2}, {"data", 2}, {"pipeline", 1}};
  return info;
}

}  // namespace normformer
