#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "normformer/tensor/rectangle.h"

namespace normformer {

/// Elements `range` of a rectangle of a logical matrix, flattened row by row: where a piece lies.
struct PiecePlace {
  Rectangle rectangle;
  Range range;
  bool operator==(const PiecePlace&) const = default;
};

/// A rectangle of a logical matrix whose elements stand together: a run of one of its rows, or whole rows of
/// a PiecePlace.
struct Box {
  Range rows;
  Range columns;
};

/// A place as at most three boxes, which share no row and stand in the order of their elements; unused ones
/// are empty.
std::array<Box, 3> boxes_of(const PiecePlace& place);

/// The index of the element at row, column of the logical matrix among the place's elements, which it must be
/// one of.
int64_t index_in(const PiecePlace& place, int64_t row, int64_t column);

/// Calls visit(index in from, index in to, count) for runs of elements that two places of one logical matrix
/// share, in ascending order of both indices.
void for_each_shared_run(const PiecePlace& from, const PiecePlace& to,
                         const std::function<void(int64_t, int64_t, int64_t)>& visit);

/// "" where the places hold each element of a [rows, columns] matrix exactly once, else which is held twice
/// or how many are missing. Places must lie within the matrix. Takes O(n log n).
std::string find_cover_fault(int64_t rows, int64_t columns, std::span<const PiecePlace> places);

}  // namespace normformer
