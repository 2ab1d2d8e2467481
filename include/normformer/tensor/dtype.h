#pragma once

#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace normformer {

/// What one element of a tensor is.
enum class DType { f64, f32, bf16, f16, i64, i32, u8 };

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

/// IEEE 754 half precision: 5 bits of exponent, 10 of fraction; the largest number is 65504. Storage only;
/// arithmetic is in float. Converts in software, with the bits of x86's F16C and of GPUs' conversions.
struct f16 {
  uint16_t bits = 0;

  constexpr f16() = default;
  /// Rounds to nearest, ties to even: to a subnormal below 2^-14, to infinity from 65520 on; a NaN stays a
  /// NaN.
  constexpr explicit f16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t magnitude = u & 0x7FFFFFFFu;
    uint32_t half = 0;
    if (magnitude > 0x7F800000u) {
      half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    } else if (magnitude >= 0x47800000u) {
      half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {
      half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
      // 0.5 has the last bit of its fraction where a half subnormal has its own: the addition rounds.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      half = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
    }
    bits = static_cast<uint16_t>(((u >> 16) & 0x8000u) | half);
  }
  constexpr explicit operator float() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
    const uint32_t magnitude = uint32_t{bits & 0x7FFFu} << 13;
    if (magnitude > 0x0F800000u) return std::bit_cast<float>(sign | 0x7FC00000u | magnitude);
    if (magnitude == 0x0F800000u) return std::bit_cast<float>(sign | 0x7F800000u);
    // The fraction's bits are where they belong; a product with a power of two moves the exponent, exactly.
    const float moved = magnitude >= 0x00800000u ? std::bit_cast<float>(magnitude + 0x38000000u)
                                                 : static_cast<float>(bits & 0x3FFu) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(moved));
  }
};

/// Whether T is one of the two types of 16 bits.
template <class T>
inline constexpr bool kIs16Bit = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

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
    case DType::f16:
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
    case DType::f16:
      return "f16";
    case DType::i64:
      return "i64";
    case DType::i32:
      return "i32";
    case DType::u8:
      return "u8";
  }
  return "?";
}

constexpr bool is_16_bit(DType t) { return t == DType::bf16 || t == DType::f16; }

constexpr bool is_floating(DType t) { return t == DType::f64 || t == DType::f32 || is_16_bit(t); }

/// What sums of elements of `t` are kept in, and so the type of statistics, main gradients and optimizer
/// state: fp64 for fp64, fp32 for fp32 and the types of 16 bits.
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
  else if constexpr (std::is_same_v<T, f16>)
    return DType::f16;
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
