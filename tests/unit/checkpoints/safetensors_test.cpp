#include "normformer/checkpoints/safetensors.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "faults/memory_files.h"
#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;

std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

/// A file of this header and `data_bytes` zeros.
std::string make_file(const std::string& json, size_t data_bytes) {
  std::string file(8, '\0');
  const uint64_t length = json.size();
  std::memcpy(file.data(), &length, 8);
  return file + json + std::string(data_bytes, '\0');
}

std::string refusal(const std::filesystem::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
  try {
    const SafetensorsReader reader(path);
  } catch (const DataError& e) {
    return e.what();
  }
  return "accepted";
}

template <class T>
Tensor counting(Context& context, const Shape& shape, DType dtype) {
  const Tensor tensor = context.empty(shape, dtype);
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.data<T>()[i] = static_cast<T>(static_cast<float>(i));
  return tensor;
}

// The library's own output for {"a": [1.0, 2.0]} with metadata {"format": "pt"}.
TEST(SafetensorsWriter, WritesTheLibrarysBytes) {
  const TemporaryFolder folder;
  Context context(DeviceKind::cpu);
  const auto files = make_system_files();
  const std::vector<float> values{1.0f, 2.0f};
  SafetensorsWriter writer(*files, folder / "a.safetensors", {{"a", DType::f32, {2}}});
  writer.write("a", from_host<float>(context, values, {2}));
  EXPECT_FALSE(std::filesystem::exists(folder / "a.safetensors"));
  writer.finish();
  EXPECT_EQ(
      bytes_of(folder / "a.safetensors"),
      from_hex("58000000000000007b225f5f6d657461646174615f5f223a7b22666f726d6174223a227074227d2c2261223a7b22"
               "6474797065223a22463332222c227368617065223a5b325d2c22646174615f6f666673657473223a5b302c385d7d"
               "7d2020200000803f00000040"));
}

// From the library's unit tests: an empty file with and without metadata, and one of shape [1, 2, 3].
TEST(SafetensorsWriter, WritesTheLibrarysBytesOfEmptyAndUnpaddedFiles) {
  const TemporaryFolder folder;
  Context context(DeviceKind::cpu);
  const auto files = make_system_files();
  SafetensorsWriter(*files, folder / "empty", {}, {}).finish();
  EXPECT_EQ(bytes_of(folder / "empty"), std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
  SafetensorsWriter(*files, folder / "metadata", {}, {{"framework", "pt"}}).finish();
  EXPECT_EQ(bytes_of(folder / "metadata"),
            std::string("\x28\0\0\0\0\0\0\0{\"__metadata__\":{\"framework\":\"pt\"}}     ", 48));
  SafetensorsWriter writer(*files, folder / "attn", {{"attn.0", DType::f32, {1, 2, 3}}}, {});
  writer.write("attn.0", counting<float>(context, {1, 2, 3}, DType::f32));
  writer.finish();
  EXPECT_EQ(bytes_of(folder / "attn").substr(0, 72),
            std::string("\x40\0\0\0\0\0\0\0", 8) +
                R"({"attn.0":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}})");
}

TEST(SafetensorsWriter, OrdersByTypeThenNameAndLeavesNothingUnfinished) {
  const TemporaryFolder folder;
  const auto files = make_system_files();
  {
    SafetensorsWriter writer(*files, folder / "order",
                             {{"u", DType::u8, {1}},
                              {"h", DType::bf16, {1}},
                              {"f", DType::f16, {1}},
                              {"b", DType::f32, {1}},
                              {"a", DType::f32, {1}},
                              {"i", DType::i32, {1}},
                              {"d", DType::f64, {1}},
                              {"l", DType::i64, {1}}});
    std::string order;
    for (const SafetensorsPlan& plan : writer.order()) order += plan.name;
    EXPECT_EQ(order, "ldabihfu");
    EXPECT_THROW(writer.finish(), LogicError);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  EXPECT_THROW(SafetensorsWriter(*files, folder / "twice", {{"a", DType::f32, {1}}, {"a", DType::u8, {1}}}),
               LogicError);
}

TEST(Safetensors, EveryTypeComesBackAsItWas) {
  const TemporaryFolder folder;
  Context context(DeviceKind::cpu);
  const auto files = make_system_files();
  const std::map<std::string, Tensor> tensors{{"f64", counting<double>(context, {3, 5}, DType::f64)},
                                              {"f32", counting<float>(context, {7}, DType::f32)},
                                              {"bf16", counting<bf16>(context, {2, 3}, DType::bf16)},
                                              {"f16", counting<f16>(context, {3, 2}, DType::f16)},
                                              {"i64", counting<int64_t>(context, {2}, DType::i64)},
                                              {"i32", counting<int32_t>(context, {2}, DType::i32)},
                                              {"u8", counting<uint8_t>(context, {5}, DType::u8)},
                                              {"scalar", counting<float>(context, {}, DType::f32)},
                                              {"none", context.empty({0, 4}, DType::f32)}};
  std::vector<SafetensorsPlan> plans;
  for (const auto& [name, tensor] : tensors) plans.push_back({name, tensor.dtype(), tensor.shape()});
  SafetensorsWriter writer(*files, folder / "all", plans);
  for (const SafetensorsPlan& plan : writer.order()) writer.write(plan.name, tensors.at(plan.name));
  writer.finish();

  const SafetensorsReader reader(folder / "all");
  EXPECT_EQ(reader.tensors().size(), tensors.size());
  EXPECT_EQ(reader.metadata().at("format"), "pt");
  for (const auto& [name, tensor] : tensors) {
    const Tensor back = reader.read(context, name);
    EXPECT_EQ(back.shape(), tensor.shape()) << name;
    EXPECT_EQ(back.dtype(), tensor.dtype()) << name;
    if (tensor.numel() > 0) {
      EXPECT_EQ(std::memcmp(back.raw(), tensor.raw(), static_cast<size_t>(tensor.nbytes())), 0);
    }
  }
}

TEST(Safetensors, PartsAreReadAndConverted) {
  const TemporaryFolder folder;
  Context context(DeviceKind::cpu);
  const auto files = make_system_files();
  const Tensor matrix = counting<float>(context, {7, 6}, DType::f32);
  SafetensorsWriter writer(*files, folder / "m", {{"m", DType::f64, {7, 6}}, {"v", DType::f32, {42}}});
  writer.write("m", matrix);
  writer.write("v", matrix);
  writer.finish();

  const SafetensorsReader reader(folder / "m");
  const Tensor part = context.empty({3, 2}, DType::bf16);
  reader.read("m", {{2, 5}, {3, 5}, 7, 6}, part);
  EXPECT_EQ(to_host(part), (std::vector<double>{15, 16, 21, 22, 27, 28}));
  const Tensor rows = context.empty({12}, DType::f64);
  reader.read("m", {{4, 6}, {0, 6}, 7, 6}, rows);
  EXPECT_EQ(to_host(rows), (std::vector<double>{24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35}));
  const Tensor vector = context.empty({2}, DType::f32);
  reader.read("v", {{40, 42}, {0, 1}, 42, 1}, vector);
  EXPECT_EQ(to_host(vector), (std::vector<double>{40, 41}));

  try {
    reader.read("m", {{0, 6}, {0, 7}, 6, 7}, context.empty({42}, DType::f32));
    FAIL();
  } catch (const DataError& e) {
    EXPECT_THAT(e.what(), HasSubstr("tensor 'm' is a matrix of 7 x 6 ([7, 6]), where 6 x 7 is wanted"));
  }
  EXPECT_THROW(reader.read("m", {{0, 7}, {0, 6}, 7, 6}, context.empty({42}, DType::i64)), DataError);
  try {
    reader.tensor("n");
    FAIL();
  } catch (const DataError& e) {
    EXPECT_THAT(e.what(), HasSubstr("has no tensor 'n'; among its 2 tensors is 'v'"));
  }
}

TEST(Safetensors, LongTensorsPassThroughTheSmallBuffer) {
  const TemporaryFolder folder;
  Context context(DeviceKind::cpu);
  const auto files = make_system_files();
  const int64_t count = 700'001;
  const Tensor values = counting<float>(context, {count}, DType::f32);
  SafetensorsWriter writer(*files, folder / "long", {{"x", DType::f64, {count}}});
  writer.write("x", values);
  writer.finish();
  const Tensor back = context.empty({count}, DType::f32);
  SafetensorsReader(folder / "long").read("x", {{0, count}, {0, 1}, count, 1}, back);
  EXPECT_EQ(std::memcmp(back.raw(), values.raw(), static_cast<size_t>(values.nbytes())), 0);
}

// Every half there is, held against its definition: (-1)^s 2^(e-15) (1 + f/1024), 2^-14 f/1024 for e = 0.
TEST(SafetensorsReader, HalvesAreReadAsTheyAreAndBecomeFloatsExactly) {
  const TemporaryFolder folder;
  std::string file = make_file(R"({"h":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}})", 131072);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    std::memcpy(file.data() + file.size() - 131072 + 2 * bits, &half, 2);
  }
  std::ofstream(folder / "h", std::ios::binary) << file;
  Context context(DeviceKind::cpu);
  const SafetensorsReader reader(folder / "h");
  const Tensor halves = reader.read(context, "h");
  ASSERT_EQ(halves.dtype(), DType::f16);
  const Tensor read = context.empty({65536}, DType::f32);
  reader.read("h", {{0, 65536}, {0, 1}, 65536, 1}, read);
  for (int bits = 0; bits < 65536; ++bits) {
    const int exponent = (bits >> 10) & 31;
    const double fraction = (bits & 1023) / 1024.0;
    double expected = exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15);
    if (exponent == 31) {
      expected =
          fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    if (bits >= 32768) expected = -expected;
    const float got = read.data<float>()[bits];
    EXPECT_EQ(halves.data<f16>()[bits].bits, bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << bits;
    } else {
      EXPECT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(static_cast<float>(expected))) << bits;
    }
  }
}

TEST(SafetensorsReader, TypesThatNobodyNeedsAreListedAndRefusedWhenRead) {
  const TemporaryFolder folder;
  std::ofstream(folder / "b", std::ios::binary)
      << make_file(R"({"mask":{"dtype":"BOOL","shape":[2,2],"data_offsets":[0,4]}} )", 4);
  Context context(DeviceKind::cpu);
  const SafetensorsReader reader(folder / "b");
  EXPECT_EQ(reader.tensor("mask").stored_type, "BOOL");
  EXPECT_THROW(reader.read(context, "mask"), DataError);
}

TEST(SafetensorsReader, HostileHeadersAreRefusedWithTheirFault) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "hostile";
  const auto tensor = [](const std::string& name, const std::string& body) {
    return "{\"" + name + "\":" + body + "}";
  };
  struct Case {
    std::string content;
    std::string fault;
  };
  const std::string huge = "9223372036854775807";
  const Case cases[] = {
      {"", "shorter than 8 bytes"},
      {std::string("\x01\xe1\xf5\x05\0\0\0\0", 8) + "{}", "its header claims 100000001 bytes"},
      {std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8) + "{}",
       "its header claims 18446744073709551615 bytes"},
      {std::string("\x03\0\0\0\0\0\0\0", 8) + "{}", "it ends within its header of 3 bytes"},
      {make_file("", 0), "does not begin with '{'"},
      {make_file(" {}", 0), "does not begin with '{'"},
      {make_file("[]", 0), "does not begin with '{'"},
      {make_file("{", 0), "not valid JSON"},
      {make_file("{}x", 0), "not valid JSON"},
      {make_file("{\"\xff\":1}", 0), "not valid JSON"},
      {make_file(R"({"a":1})", 0), "a number stands where none belongs, in 'a'"},
      {make_file(R"({"a":"b"})", 0), "a text stands where none belongs"},
      {make_file(R"({"a":[]})", 0), "a list stands where none belongs"},
      {make_file(R"({"a":null})", 0), "a null stands where none belongs"},
      {make_file(R"({"__metadata__":{"x":1}})", 0), "a number stands where none belongs"},
      {make_file(R"({"__metadata__":{"x":"1","x":"2"}})", 0), "'__metadata__' has 'x' twice"},
      {make_file(R"({"__metadata__":{},"__metadata__":{}})", 0), "'__metadata__' stands there twice"},
      {make_file(tensor("a", R"({"shape":[1],"data_offsets":[0,4]})"), 4), "lacks its dtype"},
      {make_file(tensor("a", R"({"dtype":"F32","data_offsets":[0,4]})"), 4), "lacks its dtype, its shape"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1],"data_offsets":[0]})"), 4), "two data_offsets"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,4]})"), 4),
       "more than 2 values in 'data_offsets'"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[0,4]})"), 4),
       "more than 4 values in 'shape'"},
      {make_file(tensor("a", R"({"dtype":"F33","shape":[1],"data_offsets":[0,4]})"), 4),
       "unknown type 'F33'"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})"), 4),
       "unknown key 'x'"},
      {make_file(tensor("a", R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"), 4),
       "'a' has 'dtype' twice"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"), 4),
       "a negative number"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1.5],"data_offsets":[0,4]})"), 4),
       "not a 63-bit integer"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]})"), 4),
       "not a 63-bit integer"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[[1]],"data_offsets":[0,4]})"), 4), "a list stands"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[)" + huge + R"(],"data_offsets":[0,4]})"), 4),
       "the size of tensor 'a' leaves 64 bits"},
      {make_file(
           tensor("a", R"({"dtype":"F32","shape":[0,)" + huge + "," + huge + R"(],"data_offsets":[0,4]})"),
           4),
       "the size of tensor 'a' leaves 64 bits"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[0,3],"data_offsets":[0,4]})"), 4),
       "takes bytes 0 to 4, but its shape and type take 0 bytes"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"), 4),
       "takes bytes 0 to 4, but its shape and type take 8 bytes"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})"), 4),
       "takes bytes 4 to 0"},
      {make_file(tensor("a", R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), 8),
       "begins at byte 4 of the data, but the one before it ends at 0"},
      {make_file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                 R"("b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
                 6),
       "tensor 'b' begins at byte 2 of the data, but the one before it ends at 4"},
      {make_file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                 R"("a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                 8),
       "'a' stands there twice"},
      {make_file(tensor("a", R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})"), 5),
       "its tensors take 4 bytes, but 5 follow the header"},
      {make_file(tensor("a", R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})"), 3),
       "its tensors take 4 bytes, but 3 follow the header"},
      {make_file("{\"a\":" + std::string(100000, '['), 0), "a list stands where none belongs"},
  };
  for (const Case& c : cases) {
    const std::string message = refusal(path, c.content);
    EXPECT_THAT(message, HasSubstr(c.fault)) << c.content.substr(0, 200);
    if (message != "accepted") {
      EXPECT_THAT(message, HasSubstr(path.string() + " is not a valid safetensors file"));
    }
  }
}

// No flipped bit of a header may do worse than be refused or give another valid header.
TEST(SafetensorsReader, NoFlippedBitOfAHeaderDoesHarm) {
  MemoryFiles files;
  const std::string good = make_file(R"({"__metadata__":{"format":"pt"},)"
                                     R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                     R"("b":{"dtype":"U8","shape":[],"data_offsets":[24,25]}})",
                                     25);
  files.create("file")->append(as_bytes(good));
  EXPECT_EQ(SafetensorsReader(files, "file").tensors().size(), 2u);
  int refused = 0;
  const size_t bits = (good.size() - 25) * 8;
  for (size_t bit = 0; bit < bits; ++bit) {
    files.content("file") = good;
    files.content("file")[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    try {
      const SafetensorsReader reader(files, "file");
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, static_cast<int>(bits / 2));
}

TEST(SafetensorsReader, MissingFilesAreNamed) {
  try {
    const SafetensorsReader reader("no/such.safetensors");
    FAIL();
  } catch (const IoError& e) {
    EXPECT_STREQ(e.what(), "cannot open no/such.safetensors: No such file or directory");
  }
}

// Numbers read from these files with numpy.
TEST(SafetensorsReader, ReadsTheReferencesFiles) {
  const char* given = std::getenv("NORMFORMER_TEST_DATA");
  const auto folder = std::filesystem::path(given != nullptr ? given : NORMFORMER_TEST_DATA_DEFAULT) /
                      "oracle" / "fixtures" / "normformer";
  if (!std::filesystem::exists(folder)) {
    GTEST_SKIP() << folder << " is absent; name the reference data's folder in NORMFORMER_TEST_DATA";
  }
  Context context(DeviceKind::cpu);
  const SafetensorsReader expected(folder / "expected.safetensors");
  const Tensor tokens = expected.read(context, "tokens");
  EXPECT_EQ(tokens.shape(), Shape({4, 33}));
  EXPECT_EQ(tokens.data<int64_t>()[0], 184);
  EXPECT_EQ(tokens.data<int64_t>()[4], 256);
  EXPECT_EQ(expected.read(context, "nll").data<double>()[2], 5.141848914364729);
  const SafetensorsReader weights(folder / "weights.safetensors");
  const Tensor part = context.empty({2, 3}, DType::f64);
  weights.read("decoder.layers.0.fc1.weight", {{16, 18}, {4, 7}, 128, 32}, part);
  EXPECT_EQ(to_host(part),
            (std::vector<double>{-0.0960443764925003, -0.11849579215049744, 0.008601170964539051,
                                 -0.1103641614317894, -0.1159771978855133, -0.3445895314216614}));
}

}  // namespace
}  // namespace normformer
