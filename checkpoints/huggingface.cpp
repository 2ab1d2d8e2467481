#include "normformer/checkpoints/huggingface.h"

#include <array>

#include <nlohmann/json.hpp>

#include "normformer/core/error.h"

namespace normformer {

namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostLevels = 64;
constexpr std::string_view kLayers = "decoder.layers.";

// One key of a config.json and the key of this program's [model] section that means the same.
struct SharedKey {
  std::string theirs;
  std::string ours;
  bool required = false;
  Json otherwise = nullptr;  ///< what it means where it is absent; null: ours' default
};

const std::vector<SharedKey>& gpt2_keys() {
  static const std::vector<SharedKey> keys = {{"vocab_size", "vocab", true},
                                              {"n_positions", "length", true},
                                              {"n_embd", "width", true},
                                              {"n_layer", "layers", true},
                                              {"n_head", "heads", true},
                                              {"n_inner", "ffn"},
                                              {"layer_norm_epsilon", "norm_eps", false, 1e-5},
                                              {"resid_pdrop", "residual_dropout", false, 0.1},
                                              {"embd_pdrop", "embedding_dropout", false, 0.1},
                                              {"attn_pdrop", "attention_dropout", false, 0.1}};
  return keys;
}

// NormFormerConfig has this program's keys, whichever there are.
std::vector<SharedKey> normformer_keys() {
  constexpr std::string_view section = "model.";
  std::vector<SharedKey> keys;
  for (const ConfigKey& key : config_keys()) {
    if (!key.name.starts_with(section)) continue;
    const std::string name = key.name.substr(section.size());
    const bool size =
        name == "layers" || name == "width" || name == "heads" || name == "vocab" || name == "length";
    keys.push_back({name, name, size});
  }
  return keys;
}

// transformers' name, and all others under which it knows the same function.
constexpr std::array<std::pair<std::string_view, Activation>, 5> kActivations = {
    {{"gelu", Activation::gelu},
     {"gelu_new", Activation::gelu_tanh},
     {"relu2", Activation::relu_squared},
     {"gelu_pytorch_tanh", Activation::gelu_tanh},
     {"gelu_fast", Activation::gelu_tanh}}};

struct Gpt2Name {
  std::string_view ours;
  std::string_view theirs;
  int64_t part = 0;
  int64_t parts = 1;
  bool is_product = false;  ///< whose weight is transposed
};

constexpr std::array<Gpt2Name, 8> kGpt2LayerNames = {{{"self_attn.q_proj", "attn.c_attn", 0, 3, true},
                                                      {"self_attn.k_proj", "attn.c_attn", 1, 3, true},
                                                      {"self_attn.v_proj", "attn.c_attn", 2, 3, true},
                                                      {"self_attn.out_proj", "attn.c_proj", 0, 1, true},
                                                      {"self_attn_layer_norm", "ln_1"},
                                                      {"final_layer_norm", "ln_2"},
                                                      {"fc1", "mlp.c_fc", 0, 1, true},
                                                      {"fc2", "mlp.c_proj", 0, 1, true}}};

constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kGpt2Names = {
    {{"decoder.embed_tokens.weight", "transformer.wte.weight"},
     {"decoder.embed_positions.weight", "transformer.wpe.weight"},
     {"decoder.layer_norm.weight", "transformer.ln_f.weight"},
     {"decoder.layer_norm.bias", "transformer.ln_f.bias"}}};

std::optional<HuggingFacePlace> gpt2_layer_place(std::string_view name) {
  name.remove_prefix(kLayers.size());
  const size_t dot = name.find('.');
  const size_t last = name.rfind('.');
  if (dot == std::string_view::npos || last <= dot) return std::nullopt;
  const std::string_view module = name.substr(dot + 1, last - dot - 1);
  const std::string_view kind = name.substr(last + 1);
  for (const Gpt2Name& known : kGpt2LayerNames) {
    if (known.ours != module) continue;
    return HuggingFacePlace{fmt::format("transformer.h.{}.{}.{}", name.substr(0, dot), known.theirs, kind),
                            known.part, known.parts, known.is_product && kind == "weight"};
  }
  return std::nullopt;
}

std::string_view name_of_type(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "float64";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    default:
      return "float32";
  }
}

Json value_of(const ModelConfig& model, const std::string& key) {
  RunConfig config;
  config.model = model;
  return Json::parse(toml_value(config, "model." + key));
}

void put_shared(Json& json, const ModelConfig& model, const std::vector<SharedKey>& keys) {
  for (const SharedKey& key : keys) json[key.theirs] = value_of(model, key.ours);
}

Json gpt2_config(const ModelConfig& model) {
  Json json;
  json["architectures"] = {"GPT2LMHeadModel"};
  json["model_type"] = "gpt2";
  put_shared(json, model, gpt2_keys());
  for (const auto& [name, activation] : kActivations) {
    if (activation != model.activation) continue;
    json["activation_function"] = name;
    break;
  }
  json["initializer_range"] = 0.02;
  json["scale_attn_weights"] = true;
  return json;
}

Json normformer_config(const ModelConfig& model) {
  Json json;
  json["architectures"] = {"NormFormerForCausalLM"};
  json["model_type"] = "normformer";
  json["auto_map"] = {{"AutoConfig", "configuration_normformer.NormFormerConfig"},
                      {"AutoModelForCausalLM", "modeling_normformer.NormFormerForCausalLM"}};
  put_shared(json, model, normformer_keys());
  return json;
}

Json parse_object(std::string_view text, const std::string& file) {
  const auto shallow = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kMostLevels)
      throw DataError(fmt::format("{} is nested more than {} levels deep", file, kMostLevels));
    return true;
  };
  try {
    Json json = Json::parse(text, shallow);
    if (!json.is_object()) throw DataError(fmt::format("{} is not one JSON object", file));
    return json;
  } catch (const Json::exception& e) {
    const std::string_view what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    const size_t bracket = what.find("] ");
    throw DataError(fmt::format("{} is not valid JSON: {}", file,
                                bracket == std::string_view::npos ? what : what.substr(bracket + 2)));
  }
}

HuggingFaceKind kind_of(const Json& json, const std::string& file) {
  const Json type = json.value("model_type", Json());
  if (type == "gpt2") return HuggingFaceKind::gpt2;
  if (type == "normformer") return HuggingFaceKind::normformer;
  throw DataError(fmt::format("{}: \"model_type\" is {}; only \"gpt2\" and \"normformer\" can be read", file,
                              type.is_null() ? "absent" : type.dump()));
}

// GPT-2's switches that would be another model than ours.
void check_gpt2_switches(const Json& json, const std::string& file) {
  constexpr std::array<std::pair<const char*, bool>, 4> needed = {{{"scale_attn_weights", true},
                                                                   {"scale_attn_by_inverse_layer_idx", false},
                                                                   {"add_cross_attention", false},
                                                                   {"tie_word_embeddings", true}}};
  for (const auto& [key, value] : needed) {
    const Json found = json.value(key, Json(value));
    if (found == Json(value)) continue;
    throw DataError(
        fmt::format("{}: \"{}\" is {}; this program's models have {} only", file, key, found.dump(), value));
  }
}

Activation activation_of(const Json& json, const std::string& file) {
  const Json found = json.value("activation_function", Json("gelu_new"));
  std::string known;
  for (const auto& [name, activation] : kActivations) {
    if (found == Json(name)) return activation;
    known += fmt::format("{}\"{}\"", known.empty() ? "" : ", ", name);
  }
  throw DataError(
      fmt::format("{}: \"activation_function\" is {}; it must be one of {}", file, found.dump(), known));
}

// One value as an override of the configuration, "model.heads=12".
struct GivenValue {
  std::string key;
  std::string json;
  std::string override_text;
};

std::vector<GivenValue> given_values(const Json& json, const std::vector<SharedKey>& keys,
                                     const std::string& file) {
  std::vector<GivenValue> values;
  for (const SharedKey& key : keys) {
    const Json value = json.value(key.theirs, key.otherwise);
    if (value.is_null() && key.required)
      throw DataError(fmt::format("{} has no \"{}\", which is model.{}", file, key.theirs, key.ours));
    if (value.is_null()) continue;
    if (value.is_structured())
      throw DataError(fmt::format("{}: \"{}\" should be one value, not {}", file, key.theirs,
                                  value.is_array() ? "a list" : "an object"));
    values.push_back(
        {key.theirs, value.dump(), fmt::format("model.{}={}", key.ours, value.dump(-1, ' ', true))});
  }
  return values;
}

// The reader of configurations judges the values; its sentences begin with the override that they are about.
ModelConfig read_values(const std::vector<GivenValue>& values, const std::string& file) {
  std::vector<std::string> overrides;
  for (const GivenValue& value : values) overrides.push_back(value.override_text);
  try {
    return parse_run_config("", file, overrides).model;
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    for (const GivenValue& value : values) {
      const std::string place = "--set " + value.override_text + ": ";
      if (!what.starts_with(place)) continue;
      throw DataError(
          fmt::format("{}: \"{}\": {}: {}", file, value.key, value.json, what.substr(place.size())));
    }
    throw DataError(fmt::format("{}: {}", file, what));
  }
}

}  // namespace

HuggingFaceKind huggingface_kind(const ModelConfig& m) {
  const bool baseline = m.head_scale == HeadScale::none && !m.post_attention_norm && !m.ffn_norm &&
                        !m.residual_scale && !m.qkv_norm && m.norm_position == NormPosition::pre;
  const bool language = m.attention == AttentionMask::causal && m.head == OutputHead::language;
  const bool embeds_alike = m.positions == Positions::learned && !m.embedding_scale;
  return baseline && language && embeds_alike ? HuggingFaceKind::gpt2 : HuggingFaceKind::normformer;
}

std::optional<HuggingFacePlace> huggingface_place(HuggingFaceKind kind, std::string_view name) {
  if (kind == HuggingFaceKind::normformer) return HuggingFacePlace{std::string(name)};
  for (const auto& [ours, theirs] : kGpt2Names) {
    if (name == ours) return HuggingFacePlace{std::string(theirs)};
  }
  return name.starts_with(kLayers) ? gpt2_layer_place(name) : std::nullopt;
}

std::string make_huggingface_config(const ModelConfig& model, DType dtype,
                                    std::optional<int32_t> end_of_text) {
  ModelConfig written = model;
  if (written.ffn == 0) written.ffn = 4 * written.width;
  Json json =
      huggingface_kind(model) == HuggingFaceKind::gpt2 ? gpt2_config(written) : normformer_config(written);
  json["tie_word_embeddings"] = true;
  json["use_cache"] = true;
  json["torch_dtype"] = name_of_type(dtype);
  json["bos_token_id"] = end_of_text ? Json(*end_of_text) : Json();
  json["eos_token_id"] = json["bos_token_id"];
  return json.dump(2) + "\n";
}

HuggingFaceModel parse_huggingface_config(std::string_view text, const std::string& file) {
  const Json json = parse_object(text, file);
  HuggingFaceModel found{kind_of(json, file), {}};
  const bool gpt2 = found.kind == HuggingFaceKind::gpt2;
  found.model = read_values(given_values(json, gpt2 ? gpt2_keys() : normformer_keys(), file), file);
  if (gpt2) {
    check_gpt2_switches(json, file);
    found.model.activation = activation_of(json, file);
    found.model.positions = Positions::learned;
    found.model.embedding_scale = false;
    found.model.init = Initialisation::gpt2;
  }
  if (found.model.vocab == 0) throw DataError(fmt::format("{}: a vocabulary of 0 tokens", file));
  if (found.model.ffn == 0) found.model.ffn = 4 * found.model.width;
  return found;
}

}  // namespace normformer
