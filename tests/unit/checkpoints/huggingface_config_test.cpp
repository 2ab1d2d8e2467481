// What config.json files of transformers tell, and what they get for telling nonsense.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/checkpoints/huggingface.h"
#include "normformer/core/error.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using Json = nlohmann::ordered_json;

// The values of the 124M model that OpenAI published, as transformers stores them.
constexpr const char* kGpt2 = R"({
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
  "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
  "resid_pdrop": 0.1, "summary_activation": null, "task_specific_params": {"text-generation": {"max_length": 50}},
  "vocab_size": 50257})";

Json normformer() {
  RunConfig config;
  config.model = {.layers = 2, .width = 12, .heads = 3, .vocab = 40, .length = 8};
  config.model.head_scale = HeadScale::paper;
  config.model.ffn_norm = true;
  return Json::parse(make_huggingface_config(config.model, DType::f32, 39));
}

std::string refusal_of(const std::string& text) {
  try {
    parse_huggingface_config(text, "f/config.json");
  } catch (const DataError& e) {
    return e.what();
  }
  ADD_FAILURE() << "taken: " << text.substr(0, 300);
  return "";
}

std::string refusal_with(Json json, const char* key, const std::string& value) {
  json[key] = Json::parse(value);
  return refusal_of(json.dump());
}

TEST(HuggingFaceConfig, ReadsThePublishedGpt2) {
  const HuggingFaceModel found = parse_huggingface_config(kGpt2, "config.json");
  EXPECT_EQ(found.kind, HuggingFaceKind::gpt2);
  const ModelConfig& m = found.model;
  EXPECT_EQ((std::vector{m.layers, m.width, m.heads, m.ffn, m.vocab, m.length}),
            (std::vector<int64_t>{12, 768, 12, 3072, 50257, 1024}));
  EXPECT_EQ(m.activation, Activation::gelu_tanh);
  EXPECT_EQ(m.positions, Positions::learned);
  EXPECT_FALSE(m.embedding_scale || m.ffn_norm || m.post_attention_norm || m.residual_scale || m.qkv_norm);
  EXPECT_EQ(m.head_scale, HeadScale::none);
  EXPECT_EQ(huggingface_kind(m), HuggingFaceKind::gpt2);
}

TEST(HuggingFaceConfig, TakesTransformersDefaultsForWhatIsAbsent) {
  Json json = Json::parse(kGpt2);
  for (const char* key : {"activation_function", "layer_norm_epsilon", "resid_pdrop", "attn_pdrop"})
    json.erase(key);
  const ModelConfig model = parse_huggingface_config(json.dump(), "config.json").model;
  EXPECT_EQ(model.activation, Activation::gelu_tanh);
  EXPECT_EQ(model.norm_eps, 1e-5);
  EXPECT_EQ(model.residual_dropout, 0.1);
  EXPECT_EQ(model.attention_dropout, 0.1);
}

TEST(HuggingFaceConfig, EveryKeyOfAModelComesBack) {
  RunConfig config;
  config.model = {.layers = 2, .width = 12, .heads = 3, .ffn = 30, .vocab = 40, .length = 8};
  config.model.head_scale = HeadScale::fairseq;
  config.model.post_attention_norm = config.model.qkv_norm = config.model.residual_scale = true;
  config.model.activation = Activation::relu_squared;
  config.model.norm_position = NormPosition::post;
  config.model.positions = Positions::learned;
  config.model.embedding_scale = false;
  config.model.norm_eps = 3e-6;
  config.model.embedding_dropout = 0.25;
  RunConfig back;
  back.model =
      parse_huggingface_config(make_huggingface_config(config.model, DType::f32, std::nullopt), "config.json")
          .model;
  EXPECT_EQ(to_toml(back), to_toml(config));
}

TEST(HuggingFaceConfig, WhatIsMissingIsNamed) {
  for (const char* key : {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}) {
    Json json = Json::parse(kGpt2);
    json.erase(key);
    EXPECT_THAT(refusal_of(json.dump()),
                StartsWith(fmt::format("f/config.json has no \"{}\", which is model.", key)));
    json[key] = nullptr;
    EXPECT_THAT(refusal_of(json.dump()), HasSubstr(fmt::format("has no \"{}\"", key)));
  }
  for (const char* key : {"layers", "width", "heads", "vocab", "length"}) {
    Json json = normformer();
    json.erase(key);
    EXPECT_THAT(refusal_of(json.dump()), StartsWith(fmt::format("f/config.json has no \"{}\"", key)));
  }
  Json json = Json::parse(kGpt2);
  json.erase("model_type");
  EXPECT_THAT(refusal_of(json.dump()),
              HasSubstr("\"model_type\" is absent; only \"gpt2\" and \"normformer\""));
}

TEST(HuggingFaceConfig, SizesThatAreNoneAreRefusedWithTheirKey) {
  for (const char* value :
       {"0", "-12", "1.5", "1e300", "1e30", "true", "\"12\"", "4611686018427387904", "9223372036854775808",
        "-9223372036854775809", "1099511627776", "[12]", "{\"a\": 1}"}) {
    for (const char* key : {"n_positions", "n_embd", "n_layer", "n_head", "vocab_size"}) {
      const std::string said = refusal_with(Json::parse(kGpt2), key, value);
      if (std::string_view(value) == "0" && std::string_view(key) == "vocab_size") {
        EXPECT_EQ(said, "f/config.json: a vocabulary of 0 tokens");
      } else {
        EXPECT_THAT(said, StartsWith(fmt::format("f/config.json: \"{}\"", key))) << value;
      }
      EXPECT_THAT(said, Not(HasSubstr("\n")));
    }
    EXPECT_THAT(refusal_with(normformer(), "width", value), StartsWith("f/config.json: \"width\"")) << value;
  }
  EXPECT_THAT(refusal_with(Json::parse(kGpt2), "n_head", "7"),
              HasSubstr("model.heads = 7 does not divide model.width = 768"));
}

TEST(HuggingFaceConfig, ValuesOfOtherTypesAreRefusedWithTheirKey) {
  for (const char* value : {"3", "\"relu\"", "null", "true", "[\"gelu_new\"]", "{}"})
    EXPECT_THAT(refusal_with(Json::parse(kGpt2), "activation_function", value),
                AllOf(HasSubstr("\"activation_function\" is "), HasSubstr("\"gelu_new\"")))
        << value;
  for (const char* value : {"\"yes\"", "2", "1.0", "\"true\""})
    EXPECT_THAT(refusal_with(normformer(), "ffn_norm", value), StartsWith("f/config.json: \"ffn_norm\": "))
        << value;
  for (const char* value : {"-0.1", "1.0", "1e9", "\"0.1\"", "true", "[0.1]"}) {
    EXPECT_THAT(refusal_with(Json::parse(kGpt2), "resid_pdrop", value),
                StartsWith("f/config.json: \"resid_pdrop\""))
        << value;
  }
  for (const char* value : {"0", "-1e-5", "\"small\"", "{}"}) {
    EXPECT_THAT(refusal_with(Json::parse(kGpt2), "layer_norm_epsilon", value),
                StartsWith("f/config.json: \"layer_norm_epsilon\""))
        << value;
  }
  for (const char* value : {"3", "[\"gpt2\"]", "\"llama\"", "\"GPT2\"", "{}"})
    EXPECT_THAT(refusal_with(Json::parse(kGpt2), "model_type", value), HasSubstr("\"model_type\" is "))
        << value;
}

TEST(HuggingFaceConfig, SwitchesOfOtherModelsAreRefused) {
  for (const auto& [key, value] :
       std::vector<std::pair<const char*, const char*>>{{"scale_attn_weights", "false"},
                                                        {"scale_attn_by_inverse_layer_idx", "true"},
                                                        {"add_cross_attention", "true"},
                                                        {"tie_word_embeddings", "false"},
                                                        {"tie_word_embeddings", "\"no\""}})
    EXPECT_THAT(refusal_with(Json::parse(kGpt2), key, value),
                HasSubstr(fmt::format("\"{}\" is {}", key, value)));
}

// A value must not become another key of the configuration.
TEST(HuggingFaceConfig, TextStaysAValue) {
  for (const char* value : {R"("paper\"\nlayers = 1")", R"("paper\", width = 1")", R"("@/etc/passwd")",
                            R"("\u0000")", R"("\ud83d\ude00")"}) {
    const std::string said = refusal_with(normformer(), "head_scale", value);
    EXPECT_THAT(said, StartsWith("f/config.json: \"head_scale\": "));
    EXPECT_THAT(said, Not(HasSubstr("\n")));
  }
}

TEST(HuggingFaceConfig, WhatIsNoObjectIsRefused) {
  for (const char* text : {"", " ", "null", "[]", "\"gpt2\"", "12", "true"})
    EXPECT_THAT(refusal_of(text), StartsWith("f/config.json is not ")) << text;
  const std::string whole = kGpt2;
  for (size_t size = 1; size < whole.size(); ++size)
    EXPECT_THAT(refusal_of(whole.substr(0, size)), StartsWith("f/config.json is not valid JSON: "));
  for (const char* text : {R"({"model_type": "gpt2",})", R"({"n_embd": NaN})", R"({"n_embd": 0x10})",
                           "{\"a\": \"\xff\"}", R"({'a': 1})", R"({"a": 1} {"b": 2})"})
    EXPECT_THAT(refusal_of(text), StartsWith("f/config.json is not valid JSON: ")) << text;
  const std::string deep = std::string(100000, '[');
  EXPECT_THAT(refusal_of("{\"a\": " + deep), HasSubstr("nested more than 64 levels deep"));
}

}  // namespace
}  // namespace normformer
