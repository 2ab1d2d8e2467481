#include "layout.h"

#include <algorithm>
#include <map>
#include <vector>

#include <fmt/format.h>

namespace normformer {

namespace {

/// One side of a box that a line sweeping down the rows meets.
struct Edge {
  int64_t row;
  bool begins;
  Range columns;
};

std::vector<Edge> edges_of(std::span<const PiecePlace> places) {
  std::vector<Edge> edges;
  edges.reserve(places.size() * 2);
  for (const PiecePlace& place : places) {
    for (const Box& box : boxes_of(place)) {
      if (box.rows.empty() || box.columns.empty()) continue;
      edges.push_back({box.rows.begin, true, box.columns});
      edges.push_back({box.rows.end, false, box.columns});
    }
  }
  std::sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) {
    return std::tuple(a.row, a.begins, a.columns.begin) < std::tuple(b.row, b.begins, b.columns.begin);
  });
  return edges;
}

}  // namespace

std::array<Box, 3> boxes_of(const PiecePlace& place) {
  const Rectangle& rectangle = place.rectangle;
  const int64_t width = rectangle.columns.size();
  std::array<Box, 3> boxes{};
  if (place.range.empty() || width <= 0) return boxes;
  const int64_t first_row = place.range.begin / width;
  const int64_t last_row = (place.range.end - 1) / width;
  const auto box = [&](int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    return Box{{rectangle.rows.begin + row_begin, rectangle.rows.begin + row_end},
               {rectangle.columns.begin + column_begin, rectangle.columns.begin + column_end}};
  };
  const int64_t first_column = place.range.begin - first_row * width;
  const int64_t end_column = place.range.end - last_row * width;
  if (first_row == last_row) {
    boxes[0] = box(first_row, first_row + 1, first_column, end_column);
    return boxes;
  }
  const int64_t whole_begin = first_column == 0 ? first_row : first_row + 1;
  const int64_t whole_end = end_column == width ? last_row + 1 : last_row;
  if (first_column != 0) boxes[0] = box(first_row, first_row + 1, first_column, width);
  if (whole_begin < whole_end) boxes[1] = box(whole_begin, whole_end, 0, width);
  if (end_column != width) boxes[2] = box(last_row, last_row + 1, 0, end_column);
  return boxes;
}

int64_t index_in(const PiecePlace& place, int64_t row, int64_t column) {
  const Rectangle& rectangle = place.rectangle;
  return (row - rectangle.rows.begin) * rectangle.columns.size() + column - rectangle.columns.begin -
         place.range.begin;
}

void for_each_shared_run(const PiecePlace& from, const PiecePlace& to,
                         const std::function<void(int64_t, int64_t, int64_t)>& visit) {
  for (const Box& a : boxes_of(from)) {
    for (const Box& b : boxes_of(to)) {
      const Range rows = intersect(a.rows, b.rows);
      const Range columns = intersect(a.columns, b.columns);
      if (rows.empty() || columns.empty()) continue;
      const bool whole_rows =
          columns.size() == from.rectangle.columns.size() && columns.size() == to.rectangle.columns.size();
      const int64_t step = whole_rows ? rows.size() : 1;
      for (int64_t row = rows.begin; row < rows.end; row += step) {
        visit(index_in(from, row, columns.begin), index_in(to, row, columns.begin), step * columns.size());
      }
    }
  }
}

std::string find_cover_fault(int64_t rows, int64_t columns, std::span<const PiecePlace> places) {
  std::map<int64_t, int64_t> open;  // where the boxes that the line crosses begin and end
  for (const Edge& edge : edges_of(places)) {
    if (!edge.begins) {
      open.erase(edge.columns.begin);
      continue;
    }
    const auto next = open.lower_bound(edge.columns.begin);
    const bool meets_next = next != open.end() && next->first < edge.columns.end;
    const bool meets_previous = next != open.begin() && std::prev(next)->second > edge.columns.begin;
    if (meets_next || meets_previous) {
      return fmt::format("the element at row {}, column {} is held twice", edge.row,
                         meets_previous ? edge.columns.begin : next->first);
    }
    open.emplace(edge.columns.begin, edge.columns.end);
  }
  int64_t held = 0;  // cannot overflow: no element was held twice
  for (const PiecePlace& place : places) held += std::max<int64_t>(0, place.range.size());
  if (held == rows * columns) return "";
  return fmt::format("{} of its {} elements are held by no piece", rows * columns - held, rows * columns);
}

}  // namespace normformer
