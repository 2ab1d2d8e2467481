#pragma once

#include "normformer/tensor/dispatch.h"

namespace normformer::ops::cpu {

/// As dispatch_floating, for the types that sums are kept in.
template <class Body>
void dispatch_accumulator(DType dtype, Body&& body) {
  NF_CHECK(dtype == DType::f64 || dtype == DType::f32, "sums are not kept in {}", name_of(dtype));
  if (dtype == DType::f64)
    body.template operator()<double>();
  else
    body.template operator()<float>();
}

}  // namespace normformer::ops::cpu
