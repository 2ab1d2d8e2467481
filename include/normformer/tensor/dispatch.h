#pragma once

#include "normformer/core/error.h"
#include "normformer/tensor/dtype.h"

namespace normformer {

/// Calls body.operator()<T>() with the C++ type of a floating-point DType: the only switch on it.
/// LogicError for other types.
template <class Body>
void dispatch_floating(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f64:
      return body.template operator()<double>();
    case DType::f32:
      return body.template operator()<float>();
    case DType::bf16:
      return body.template operator()<bf16>();
    case DType::f16:
      return body.template operator()<f16>();
    default:
      break;
  }
  NF_CHECK(false, "{} is not a floating-point type", name_of(dtype));
}

/// As dispatch_floating, for every element type.
template <class Body>
void dispatch_any(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::i64:
      return body.template operator()<int64_t>();
    case DType::i32:
      return body.template operator()<int32_t>();
    case DType::u8:
      return body.template operator()<uint8_t>();
    default:
      return dispatch_floating(dtype, std::forward<Body>(body));
  }
}

}  // namespace normformer
