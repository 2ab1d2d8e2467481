#include "element.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "normformer/core/error.h"
#include "normformer/tensor/dispatch.h"

namespace normformer {

namespace {

static_assert(std::endian::native == std::endian::little, "files are read and written as memory has them");

constexpr std::array<StoredType, 15> kStoredTypes{{
    {"F64", 8, DType::f64},
    {"F32", 4, DType::f32},
    {"BF16", 2, DType::bf16},
    {"F16", 2, DType::f16},
    {"I64", 8, DType::i64},
    {"I32", 4, DType::i32},
    {"U8", 1, DType::u8},
    {"BOOL", 1, std::nullopt},
    {"I8", 1, std::nullopt},
    {"F8_E5M2", 1, std::nullopt},
    {"F8_E4M3", 1, std::nullopt},
    {"I16", 2, std::nullopt},
    {"U16", 2, std::nullopt},
    {"U32", 4, std::nullopt},
    {"U64", 8, std::nullopt},
}};

template <class From, class To>
void convert(std::span<const std::byte> source, To* out) {
  using Wide = std::conditional_t<std::is_same_v<From, double>, double, float>;
  const size_t count = source.size() / sizeof(From);
  for (size_t i = 0; i < count; ++i) {
    From x;
    std::memcpy(&x, source.data() + i * sizeof(From), sizeof(From));
    out[i] = static_cast<To>(static_cast<Accumulator<To>>(static_cast<Wide>(x)));
  }
}

}  // namespace

std::optional<StoredType> find_stored_type(std::string_view name) {
  for (const StoredType& type : kStoredTypes) {
    if (type.name == name) return type;
  }
  return std::nullopt;
}

StoredType stored_type_of(DType dtype) {
  for (const StoredType& type : kStoredTypes) {
    if (type.dtype == dtype) return type;
  }
  NF_CHECK(false, "no stored type for {}", name_of(dtype));
}

bool is_convertible(const StoredType& from, DType to) {
  if (!from.dtype) return false;
  return from.dtype == to || (is_floating(*from.dtype) && is_floating(to));
}

void convert_elements(const StoredType& from, std::span<const std::byte> source, const Tensor& into,
                      int64_t at) {
  NF_CHECK(is_convertible(from, into.dtype()), "{} read as {}", from.name, name_of(into.dtype()));
  NF_CHECK(at >= 0 && at + static_cast<int64_t>(source.size()) / from.bytes <= into.numel(),
           "{} elements at {} of {}", static_cast<int64_t>(source.size()) / from.bytes, at, to_string(into));
  auto* out = static_cast<std::byte*>(into.host_raw()) + at * size_of(into.dtype());
  if (from.dtype == into.dtype()) {
    std::memcpy(out, source.data(), source.size());
  } else {
    dispatch_floating(*from.dtype, [&]<class From>() {
      dispatch_floating(into.dtype(), [&]<class To>() { convert<From>(source, reinterpret_cast<To*>(out)); });
    });
  }
}

}  // namespace normformer
