#pragma once

#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace normformer {

/// What one element of a tensor is.
enum class DType { f64, f32, bf16, i64, i32, u8 };

/// The upper half of an IEEE single: 8 bits of exponent, 7 of fraction. Storage only; arithmetic is in float.
struct bf16 {
  uint16_t bits = 0;

  constexpr bf16() = default;
  /// Rounds to nearest, ties to even; a NaN stays a NaN.
  constexpr explicit bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = u + 0x7FFFu + ((u >> 16) & 1u);
    bits = static_cast<uint16_t>(((u & 0x7FFFFFFFu) > 0x7F800000u ? u | 0x00400000u : rounded) >> 16);
  }
  constexpr explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

/// Bytes of one element.
constexpr int64_t size_of(DType t) {
  switch (t) {
    case DType::f64:
      return 8;
    case DType::i64:
      return 8;
    case DType::f32:
      return 4;
    case DType::i32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::u8:
      return 1;
  }
  return 0;
}

/// "f64", "bf16", ...
constexpr std::string_view name_of(DType t) {
  switch (t) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::i64:
      return "i64";
    case DType::i32:
      return "i32";
    case DType::u8:
      return "u8";
  }
  return "?";
}

constexpr bool is_floating(DType t) { return t == DType::f64 || t == DType::f32 || t == DType::bf16; }

/// What sums of elements of `t` are kept in, and so the type of statistics, main gradients and optimizer
/// state: fp64 for fp64, fp32 for fp32 and bf16.
constexpr DType accumulator_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

/// The DType of a C++ element type.
template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>)
    return DType::f64;
  else if constexpr (std::is_same_v<T, float>)
    return DType::f32;
  else if constexpr (std::is_same_v<T, bf16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<T, int64_t>)
    return DType::i64;
  else if constexpr (std::is_same_v<T, int32_t>)
    return DType::i32;
  else {
    static_assert(std::is_same_v<T, uint8_t>, "not an element type");
    return DType::u8;
  }
}

/// The C++ type behind accumulator_of.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace normformer
