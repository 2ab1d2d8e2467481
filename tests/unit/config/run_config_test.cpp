#include "normformer/config/run_config.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

using testing::HasSubstr;
using testing::StartsWith;
using Overrides = std::vector<std::string>;

RunConfig parse(const std::string& text, const Overrides& overrides = {}) {
  return parse_run_config(text, "x.toml", overrides);
}

std::string refusal(const std::string& text, const Overrides& overrides = {}) {
  try {
    parse(text, overrides);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(RunConfig, EmptyFileIsTheDefault) { EXPECT_EQ(parse(""), RunConfig()); }

TEST(RunConfig, ReadsEveryKindOfValue) {
  const RunConfig c = parse(R"(
[model]
layers = 12
head_scale = "fairseq"
ffn_norm = true
norm_eps = 1e-6
activation = "relu_squared"
[parallel]
schedule = "gpipe"
[optimizer]
lr = 1  # an integer is a number, too
[train]
seed = 9223372036854775807
[checkpoint]
folder = "runs/\"a\""
)");
  EXPECT_EQ(c.model.layers, 12);
  EXPECT_EQ(c.model.head_scale, HeadScale::fairseq);
  EXPECT_TRUE(c.model.ffn_norm);
  EXPECT_EQ(c.model.norm_eps, 1e-6);
  EXPECT_EQ(c.model.activation, Activation::relu_squared);
  EXPECT_EQ(c.parallel.schedule, PipelineSchedule::gpipe);
  EXPECT_EQ(c.optimizer.lr, 1.0);
  EXPECT_EQ(c.train.seed, 9223372036854775807U);
  EXPECT_EQ(c.checkpoint.folder, "runs/\"a\"");
  RunConfig expected;
  expected.model.layers = 12;
  EXPECT_EQ(parse("model.layers = 12"), expected) << "dotted keys are sections, too";
}

TEST(RunConfig, TellsOneValue) {
  RunConfig config;
  config.parallel.schedule = PipelineSchedule::one_f_one_b;
  config.model.layers = 7;
  EXPECT_EQ(toml_value(config, "parallel.schedule"), "\"1f1b\"");
  EXPECT_EQ(toml_value(config, "model.layers"), "7");
  EXPECT_THROW(toml_value(config, "model.layer"), LogicError);
  EXPECT_THROW(toml_value(config, "layers"), LogicError);
}

TEST(RunConfig, ReadsDataSets) {
  using Sources = std::vector<DataSource>;
  EXPECT_EQ(parse("data.train = 'a/b'").data.train, (Sources{{"a/b", 1.0}}));
  EXPECT_EQ(parse("data.train = ['a', 'b']").data.train, (Sources{{"a", 1.0}, {"b", 1.0}}));
  EXPECT_EQ(parse("[[data.valid]]\nprefix = 'a'\nweight = 3\n[[data.valid]]\nprefix = 'b'").data.valid,
            (Sources{{"a", 3.0}, {"b", 1.0}}));
}

TEST(RunConfig, RefusesWhatIsNoDataSet) {
  EXPECT_EQ(refusal("[data]\ntrain = [1]"),
            "x.toml:2:10: data.train[0] must be a string or a table of prefix and weight, not the integer 1");
  EXPECT_EQ(refusal("[data]\ntrain = 1"),
            "x.toml:2:9: data.train must be a string, or an array of strings or of { prefix, weight } "
            "tables, not the "
            "integer 1");
  EXPECT_EQ(refusal("[data]\ntrain = ['a', { prefix = 'b', wieght = 2 }]"),
            "x.toml:2:31: data.train[1].wieght is not a key; did you mean weight?");
  EXPECT_EQ(refusal("[data]\ntrain = [{ prefix = 'b', weight = 0 }]"),
            "x.toml:2:35: data.train[0].weight must be a number above 0, not the integer 0");
  EXPECT_EQ(refusal("[data]\ntrain = [{ weight = 1 }]"),
            "x.toml:2:10: data.train[0] has no prefix; write { prefix = \"...\", weight = 1.0 }");
  EXPECT_EQ(refusal("[data]\ntrain = [{ prefix = 2 }]"),
            "x.toml:2:21: data.train[0].prefix must be a string, not the integer 2");
  EXPECT_EQ(refusal("[data]\ntrain = ''"), "x.toml:2:9: data.train must not be empty");
  EXPECT_EQ(refusal("[data]\ntrain = ['c/text.bin']"),
            "x.toml:2:10: data.train[0] names a data set without its extension; write \"c/text\" in place of "
            "\"c/text.bin\"");
}

TEST(RunConfig, UnknownKeysNameTheNearest) {
  EXPECT_EQ(refusal("# first\n[model]\n  head_scal = \"paper\""),
            "x.toml:3:3: model.head_scal is not a key; did you mean model.head_scale?");
  EXPECT_EQ(refusal("[model]\nlayesr = 3"),
            "x.toml:2:1: model.layesr is not a key; did you mean model.layers?");
  EXPECT_EQ(refusal("[train]\nlr = 3"), "x.toml:2:1: train.lr is not a key; did you mean optimizer.lr?");
  EXPECT_EQ(refusal("[train]\nweigth_decay = 3"),
            "x.toml:2:1: train.weigth_decay is not a key; did you mean optimizer.weight_decay?");
  EXPECT_EQ(refusal("[device]\nzzzzzz = 3"),
            "x.toml:2:1: device.zzzzzz is not a key; the keys of device are kind, threads, tf32, "
            "tune_products, cuda_graphs, transport");
}

TEST(RunConfig, UnknownSectionsNameTheNearest) {
  EXPECT_EQ(refusal("[modle]\nlayers = 3"), "x.toml:1:2: [modle] is not a section; did you mean [model]?");
  EXPECT_EQ(
      refusal("[zzzzzz]"),
      "x.toml:1:2: [zzzzzz] is not a section; the sections are model, parallel, data, optimizer, train, "
      "checkpoint, health, metrics, device");
  EXPECT_EQ(refusal("layers = 3"),
            "x.toml:1:1: layers stands outside any section; did you mean model.layers?");
  EXPECT_EQ(refusal("model = 3"), "x.toml:1:1: model is a section and must be a table, not the integer 3");
}

TEST(RunConfig, WrongTypesSayWhatWasExpectedAndFound) {
  EXPECT_EQ(refusal("[model]\nlayers = \"four\""),
            "x.toml:2:10: model.layers must be an integer from 1 to 1073741824, not the string \"four\"");
  EXPECT_EQ(refusal("[model]\nffn_norm = 1"),
            "x.toml:2:12: model.ffn_norm must be true or false, not the integer 1");
  EXPECT_EQ(
      refusal("[train]\nupdates = 1e5"),
      "x.toml:2:11: train.updates must be an integer of at least 1, not the number 100000; write 100000");
  EXPECT_EQ(refusal("[train]\nupdates = 2.5"),
            "x.toml:2:11: train.updates must be an integer of at least 1, not the number 2.5");
  EXPECT_EQ(refusal("[train]\nupdates = inf"),
            "x.toml:2:11: train.updates must be an integer of at least 1, not the number inf");
  EXPECT_EQ(refusal("[checkpoint]\nfolder = 1979-05-27"),
            "x.toml:2:10: checkpoint.folder must be a non-empty string, not a date or time");
  EXPECT_EQ(refusal("[optimizer]\nlr = []"),
            "x.toml:2:6: optimizer.lr must be a number above 0, not an array");
  EXPECT_EQ(refusal("[model]\nactivation = \"relu_sqared\""),
            "x.toml:2:14: model.activation must be one of \"gelu\", \"gelu_tanh\", \"relu_squared\", not the "
            "string "
            "\"relu_sqared\"; did you mean \"relu_squared\"?");
  EXPECT_EQ(refusal("[device]\nkind = \"abacus\""),
            "x.toml:2:8: device.kind must be one of \"cpu\", \"cuda\", not the string \"abacus\"");
}

TEST(RunConfig, RangesAreChecked) {
  EXPECT_EQ(refusal("[model]\nlayers = 0"),
            "x.toml:2:10: model.layers must be an integer from 1 to 1073741824, not the integer 0");
  EXPECT_EQ(
      refusal("[model]\nresidual_dropout = 1.0"),
      "x.toml:2:20: model.residual_dropout must be a number of at least 0 and below 1, not the number 1");
  const std::map<std::string, std::string> too_far = {
      {"model.layers", "0"},
      {"model.width", "0"},
      {"model.heads", "0"},
      {"model.ffn", "-1"},
      {"model.vocab", "-1"},
      {"model.length", "0"},
      {"model.classes", "-1"},
      {"model.norm_eps", "0.0"},
      {"model.embedding_dropout", "1.0"},
      {"model.residual_dropout", "-0.1"},
      {"model.attention_dropout", "1"},
      {"model.activation_dropout", "1.5"},
      {"parallel.tensor", "0"},
      {"parallel.context", "0"},
      {"parallel.pipeline", "0"},
      {"parallel.data", "-1"},
      {"parallel.virtual_stages", "0"},
      {"parallel.interleave_group", "-1"},
      {"parallel.shard_group", "-1"},
      {"parallel.bucket_mib", "0.0"},
      {"data.mask_probability", "0.0"},
      {"data.mask_kept", "1.0"},
      {"data.mask_random", "-0.1"},
      {"data.mask_token", "-1"},
      {"optimizer.lr", "0.0"},
      {"optimizer.beta1", "1.0"},
      {"optimizer.beta2", "1"},
      {"optimizer.eps", "0"},
      {"optimizer.weight_decay", "-0.1"},
      {"optimizer.clip_norm", "-1"},
      {"optimizer.warmup_updates", "-1"},
      {"optimizer.decay_updates", "-1"},
      {"optimizer.min_lr", "-1e-9"},
      {"optimizer.decay_power", "0"},
      {"train.updates", "0"},
      {"train.global_batch", "0"},
      {"train.micro_batch", "0"},
      {"train.recompute_layers", "-1"},
      {"train.seed", "-1"},
      {"train.valid_every", "-1"},
      {"train.valid_sequences", "-1"},
      {"train.log_every", "0"},
      {"train.max_skipped", "0"},
      {"train.loss_scale_init", "0.0"},
      {"train.loss_scale_window", "-1"},
      {"train.loss_scale_min", "0"},
      {"checkpoint.every", "-1"},
      {"checkpoint.keep", "0"},
      {"checkpoint.keep_every", "-1"},
      {"checkpoint.staging_mib", "-1"},
      {"health.watchdog_seconds", "-1"},
      {"health.replica_check_every", "-1"},
      {"health.straggler_factor", "-1"},
      {"health.spike_zscore", "-1"},
      {"health.spike_window", "7"},
      {"health.max_rollbacks", "-1"},
      {"health.explosion_rise", "-1"},
      {"metrics.gradient_norms_every", "-1"},
      {"metrics.distributions_every", "-1"},
      {"device.threads", "-1"},
  };
  for (const ConfigKey& key : config_keys()) {
    const bool number = key.kind.starts_with("an integer") || key.kind.starts_with("a number");
    EXPECT_EQ(too_far.contains(key.name), number) << key.name << " is missing from the list above";
  }
  for (const auto& [key, value] : too_far) {
    EXPECT_THAT(refusal(key + " = " + value), HasSubstr(key + " must be a")) << key;
    EXPECT_THAT(refusal("", {key + "=" + value}),
                StartsWith("--set " + key + "=" + value + ": " + key + " must"));
  }
}

TEST(RunConfig, NumbersMustBeFinite) {
  for (const ConfigKey& key : config_keys()) {
    if (!key.kind.starts_with("a number")) continue;
    for (const std::string value : {"nan", "-nan", "inf", "-inf", "+inf"}) {
      EXPECT_THAT(refusal(key.name + " = " + value), HasSubstr(key.name + " must be a number")) << value;
    }
  }
  EXPECT_THAT(refusal("data.train = [{ prefix = 'a', weight = nan }]"),
              HasSubstr("weight must be a number above 0"));
}

TEST(RunConfig, CombinationsThatCannotRunAreRefused) {
  EXPECT_EQ(refusal("[model]\nwidth = 250\nheads = 6"),
            "x.toml:3:9: model.heads = 6 does not divide model.width = 250; heads that do: 1, 2, 5, 10");
  EXPECT_EQ(refusal("[model]\nwidth = 5\nheads = 1"),
            "x.toml:2:9: sinusoidal positions need an even model.width of at least 4, not 5; or write "
            "model.positions "
            "= \"learned\"");
  EXPECT_THAT(refusal("[model]\nwidth = 2\nheads = 1"), HasSubstr("at least 4, not 2"));
  EXPECT_EQ(refusal("[model]\nwidth = 4\nheads = 1"), "accepted");
  EXPECT_EQ(refusal("[model]\nwidth = 5\nheads = 1\npositions = 'learned'"), "accepted");
  EXPECT_EQ(refusal("[train]\nmicro_batch = 9"),
            "x.toml:2:15: train.micro_batch = 9 is more than train.global_batch = 8");
  EXPECT_EQ(refusal("[train]\nmicro_batch = 9\nglobal_batch = 9"), "accepted");
  EXPECT_EQ(
      refusal("[model]\nlength = 5\n[parallel]\ncontext = 3"),
      "x.toml:4:11: parallel.context = 3 needs sequences of at least two tokens for each of its ranks, not "
      "model.length = 5");
  EXPECT_EQ(refusal("[model]\nlength = 6\n[parallel]\ncontext = 3"), "accepted");
  EXPECT_EQ(refusal("[parallel]\ntensor = 2\n[device]\ncuda_graphs = true"),
            "x.toml:4:15: device.cuda_graphs = true needs micro-batches that stay on one GPU, not "
            "parallel.tensor = 2, parallel.context = 1 and parallel.pipeline = 1");
  EXPECT_EQ(
      refusal("[parallel]\nsharding = 'gradients'\n[device]\ncuda_graphs = true"),
      "x.toml:4:15: device.cuda_graphs = true needs parallel.sharding = \"optimizer\": the others reduce "
      "gradients behind every micro-batch");
  EXPECT_EQ(
      refusal("[optimizer]\noptimistic = true\n[device]\ncuda_graphs = true"),
      "x.toml:4:15: optimizer.optimistic = true makes a micro-batch's forward again where an update was "
      "wrong, which device.cuda_graphs = true has no graph of: leave out one of them");
  EXPECT_EQ(refusal("[train]\nrecompute_layers = 2"),
            "x.toml:2:20: train.recompute_layers = 2 needs train.recompute = \"selective\" or \"full\"");
  EXPECT_EQ(refusal("[train]\nloss_scale_window = 2"),
            "x.toml:2:21: train.loss_scale_window needs train.precision = \"fp16\" or "
            "\"fp16_memory_efficient\"");
  EXPECT_EQ(refusal("[train]\nprecision = 'fp16'\nloss_scale_init = 100"),
            "x.toml:3:19: train.loss_scale_init = 100 is not a power of two, so that taking it out of "
            "gradients would round them; write 128");
  EXPECT_EQ(refusal("[train]\nprecision = 'fp16_memory_efficient'\nloss_scale_min = 256"),
            "x.toml:3:18: train.loss_scale_min = 256 is above train.loss_scale_init = 128");
  EXPECT_EQ(refusal("[parallel]\nvirtual_stages = 2"),
            "x.toml:2:18: parallel.virtual_stages = 2 needs parallel.schedule = \"interleaved\"");
  EXPECT_EQ(refusal("[parallel]\ninterleave_group = 2"),
            "x.toml:2:20: parallel.interleave_group = 2 needs parallel.schedule = \"interleaved\"");
  EXPECT_EQ(refusal("[parallel]\npipeline = 4\ninterleave_group = 2\nschedule = 'interleaved'"),
            "x.toml:3:20: parallel.interleave_group = 2 is less than parallel.pipeline = 4: ranks would wait "
            "for each other");
  EXPECT_EQ(refusal("[parallel]\npipeline = 2\nsplit = [3]"),
            "x.toml:3:9: parallel.split has 1 parts, but the pipeline has 2");
  EXPECT_EQ(refusal("[model]\nlayers = 7\n[parallel]\npipeline = 2\nsplit = [3, 5]"),
            "x.toml:5:9: the layers of parallel.split are 8 together, not model.layers = 7");
  EXPECT_EQ(refusal("[model]\nlayers = 7\n[parallel]\npipeline = 2\nschedule = 'zb_v'\nsplit = [1, 2, 3, 1]"),
            "accepted");
  EXPECT_THAT(refusal("parallel.split = [3, 0]"),
              HasSubstr("parallel.split must be \"auto\" or an array, each an integer from 1"));
  EXPECT_THAT(refusal("parallel.split = 'even'"), HasSubstr("parallel.split must be \"auto\" or an array"));
  EXPECT_EQ(refusal("[optimizer]\nmin_lr = 1e-3"),
            "x.toml:2:10: optimizer.min_lr = 0.001 is above optimizer.lr = 0.0006");
  EXPECT_EQ(refusal("[optimizer]\nwarmup_updates = 10\ndecay_updates = 10"),
            "x.toml:3:17: optimizer.decay_updates = 10 counts from the first update and must be above "
            "optimizer.warmup_updates = 10");
  EXPECT_EQ(refusal("[optimizer]\nwarmup_updates = 10\ndecay_updates = 10\ndecay = 'constant'"), "accepted");
  EXPECT_THAT(refusal("[train]\nvalid_every = 10"),
              StartsWith("x.toml:2:15: train.valid_every = 10 needs a data set"));
}

TEST(RunConfig, ClassifiersReadTextsWithLabelsAndOthersDoNot) {
  const std::string head = "[model]\nhead = 'classification'\n";
  EXPECT_EQ(refusal("[data]\ntrain_labelled = 't.tsv'"),
            "x.toml:2:18: data.train_labelled needs model.head = \"classification\"");
  EXPECT_EQ(refusal("[data]\nvalid_labelled = 't.tsv'"),
            "x.toml:2:18: data.valid_labelled needs model.head = \"classification\"");
  EXPECT_EQ(refusal(head + "[data]\ntrain_labelled = 't.tsv'\nvalid_labelled = 'v.tsv'"), "accepted");
  EXPECT_EQ(refusal(head + "attention = 'bidirectional'\nclasses = 2"), "accepted");
  EXPECT_EQ(
      refusal(head + "[data]\ntrain = 'corpus'"),
      "x.toml:4:9: model.head = \"classification\" reads texts with labels, not data.train: name them in "
      "data.train_labelled, and the tokenizer in data.tokenizer or by train.init_from");
  EXPECT_THAT(refusal(head + "[data]\nvalid = 'corpus'"), HasSubstr("data.valid_labelled"));
  EXPECT_THAT(refusal(head + "[data]\ndocument_mask = true"),
              StartsWith("x.toml:4:17: data.document_mask = true has no use"));
  EXPECT_THAT(refusal(head + "[train]\nvalid_every = 10"), HasSubstr("name one in data.valid_labelled, or"));
  EXPECT_EQ(refusal(head + "[train]\nvalid_every = 10\n[data]\nvalid_labelled = 'v.tsv'"), "accepted");
}

TEST(RunConfig, AConflictIsLaidToTheOverride) {
  EXPECT_THAT(refusal("[model]\nheads = 8", {"model.width=12"}),
              StartsWith("--set model.width=12: model.heads = 8 does not divide model.width = 12; "));
}

TEST(RunConfig, SyntaxErrorsNameTheLine) {
  EXPECT_THAT(refusal("[model]\nlayers = \n"), StartsWith("x.toml:2:"));
  EXPECT_THAT(refusal("[model]\nlayers = 3\nlayers = 4"), StartsWith("x.toml:3:"));
  EXPECT_THAT(refusal("[model]\nlayers = 99999999999999999999"), StartsWith("x.toml:2:"));
  EXPECT_THAT(refusal("a = '\xff'"), StartsWith("x.toml:1:"));
  EXPECT_THAT(refusal("a = " + std::string(100'000, '[')), StartsWith("x.toml:1:"));
}

TEST(RunConfig, LargeTextsAreRefused) {
  EXPECT_EQ(refusal(std::string(1 << 20, '\n')), "accepted");
  EXPECT_EQ(refusal(std::string((1 << 20) + 1, '\n')),
            "x.toml: 1048577 bytes are more than a configuration may have (1048576)");
}

// Tables as deep in each other as dotted keys can make them would be destroyed by recursion.
TEST(RunConfig, DeepTablesAreRefused) {
  std::string key = "a";
  for (int i = 0; i < 400'000; ++i) key += ".a";
  const std::string sentence = ": more than 10000 dots could be tables as deep in each other";
  EXPECT_EQ(refusal(key + " = 1"), "x.toml" + sentence);
  EXPECT_EQ(refusal("[" + key + "]"), "x.toml" + sentence);
  EXPECT_EQ(refusal("", {"data.train={ " + key + " = 1 }"}), "--set" + sentence);
}

TEST(Overrides, ComeAfterTheFileAndInOrder) {
  EXPECT_EQ(parse("model.layers = 3", {"model.layers=5", "model.layers = 7"}).model.layers, 7);
}

TEST(Overrides, AreTomlOrPlainText) {
  EXPECT_EQ(parse("", {"checkpoint.folder=runs/a b"}).checkpoint.folder, "runs/a b");
  EXPECT_EQ(parse("", {"checkpoint.folder=\"runs/c\""}).checkpoint.folder, "runs/c");
  EXPECT_EQ(parse("", {"checkpoint.folder=2024"}).checkpoint.folder, "2024");
  EXPECT_EQ(parse("", {"checkpoint.folder=a=b\nc = 3"}).checkpoint.folder, "a=b\nc = 3");
  EXPECT_EQ(parse("", {"model.head_scale=paper"}).model.head_scale, HeadScale::paper);
  EXPECT_EQ(parse("", {"optimizer.lr=3e-3"}).optimizer.lr, 3e-3);
  EXPECT_EQ(parse("", {"data.train=a/b"}).data.train, (std::vector<DataSource>{{"a/b", 1.0}}));
  EXPECT_EQ(parse("", {"data.train=[{prefix='a', weight=2}, 'b']"}).data.train,
            (std::vector<DataSource>{{"a", 2.0}, {"b", 1.0}}));
  EXPECT_EQ(parse("data.train = 'a'", {"data.train=[]"}).data.train, (std::vector<DataSource>{}));
}

TEST(Overrides, ErrorsNameTheOverride) {
  EXPECT_EQ(
      refusal("", {"model.layers=1O"}),
      "--set model.layers=1O: model.layers must be an integer from 1 to 1073741824, not the string \"1O\"");
  EXPECT_THAT(refusal("", {"model.layers="}), HasSubstr("not the string \"\""));
  EXPECT_THAT(refusal("", {"model.layers=3\ntrain.seed=4"}),
              HasSubstr("not the string \"3\\u000Atrain.seed=4\""));
  EXPECT_EQ(refusal("", {"model.head_scal=paper"}),
            "--set model.head_scal=paper: model.head_scal is not a key; did you mean model.head_scale?");
  EXPECT_EQ(refusal("", {"mdel.layers=3"}),
            "--set mdel.layers=3: mdel.layers is not a key; did you mean model.layers?");
  EXPECT_EQ(refusal("", {"lr=3"}), "--set lr=3: lr is not a key; did you mean optimizer.lr?");
  EXPECT_EQ(refusal("", {"device=3"}),
            "--set device=3: device is a section; name one of its keys: kind, threads, tf32, tune_products, "
            "cuda_graphs, transport");
  EXPECT_EQ(refusal("", {"model.layers"}), "--set model.layers: an override is written section.key=value");
  EXPECT_EQ(refusal("", {"data.train.prefix=a"}),
            "--set data.train.prefix=a: data.train.prefix is not a key; the keys of data are train, valid, "
            "tokenizer, document_mask, mask_probability, mask_kept, mask_random, mask_token, train_labelled, "
            "valid_labelled, text_fields, label_field");
  EXPECT_THAT(refusal("", {"checkpoint.folder=\xff"}), HasSubstr("the value is not valid UTF-8"));
}

TEST(RunConfig, WrittenTextReadsBack) {
  RunConfig c;
  EXPECT_EQ(parse(to_toml(c)), c);
  c.data.train = {{"a\\b \"c\"\n\t\x01\x7f \xc3\xa9", 0.1}, {"d", 2}};
  c.data.valid = {{"e", 1}};
  c.data.tokenizer = "#[=]'";
  c.optimizer.lr = 1.0 / 3;
  c.optimizer.eps = 5e-324;
  c.optimizer.weight_decay = 1.7976931348623157e308;
  c.optimizer.clip_norm = 1;
  c.train.seed = 9223372036854775807U;
  EXPECT_EQ(parse(to_toml(c)), c);
  EXPECT_THAT(to_toml(c), HasSubstr("clip_norm = 1.0\n"));
}

std::map<std::string, std::string> lines_by_key(const std::string& text) {
  std::map<std::string, std::string> lines;
  std::istringstream stream(text);
  std::string line, section;
  while (std::getline(stream, line)) {
    if (line.starts_with('[')) section = line.substr(1, line.size() - 2);
    const size_t equals = line.find(" = ");
    if (equals != std::string::npos) lines[section + "." + line.substr(0, equals)] = line.substr(equals + 3);
  }
  return lines;
}

/// Another value for every key, as it is written.
const std::map<std::string, std::string>& other_values() {
  static const std::map<std::string, std::string> values = {
      {"model.layers", "5"},
      {"model.width", "512"},
      {"model.heads", "8"},
      {"model.ffn", "77"},
      {"model.vocab", "50257"},
      {"model.length", "1024"},
      {"model.head_scale", "\"paper\""},
      {"model.post_attention_norm", "true"},
      {"model.ffn_norm", "true"},
      {"model.residual_scale", "true"},
      {"model.qkv_norm", "true"},
      {"model.attention", "\"bidirectional\""},
      {"model.head", "\"classification\""},
      {"model.classes", "3"},
      {"model.activation", "\"gelu_tanh\""},
      {"model.norm_position", "\"post\""},
      {"model.positions", "\"learned\""},
      {"model.embedding_scale", "false"},
      {"model.init", "\"gpt2\""},
      {"model.ffn_norm_form", "\"plain\""},
      {"model.norm_eps", "1e-06"},
      {"model.embedding_dropout", "0.1"},
      {"model.residual_dropout", "0.2"},
      {"model.attention_dropout", "0.3"},
      {"model.activation_dropout", "0.4"},
      {"parallel.tensor", "2"},
      {"parallel.sequence", "true"},
      {"parallel.context", "5"},
      {"parallel.pipeline", "3"},
      {"parallel.data", "4"},
      {"parallel.schedule", "\"interleaved\""},
      {"parallel.sharding", "\"parameters\""},
      {"parallel.virtual_stages", "3"},
      {"parallel.interleave_group", "4"},
      {"parallel.split", "[5, 7]"},
      {"parallel.shard_group", "2"},
      {"parallel.bucket_mib", "64.5"},
      {"parallel.overlap_gradients", "false"},
      {"parallel.overlap_parameters", "false"},
      {"parallel.overlap_pipeline", "false"},
      {"parallel.overlap_context", "false"},
      {"parallel.overlap_tensor", "true"},
      {"data.train", "[\"a\", \"b\"]"},
      {"data.valid", "[{ prefix = \"c\", weight = 2.5 }]"},
      {"data.tokenizer", "\"t\""},
      {"data.document_mask", "true"},
      {"data.mask_probability", "0.2"},
      {"data.mask_kept", "0.2"},
      {"data.mask_random", "0.3"},
      {"data.mask_token", "7"},
      {"data.train_labelled", "\"train.tsv\""},
      {"data.valid_labelled", "\"valid.jsonl\""},
      {"data.text_fields", "[\"sentence1\", \"sentence2\"]"},
      {"data.label_field", "\"gold\""},
      {"optimizer.lr", "0.003"},
      {"optimizer.beta1", "0.8"},
      {"optimizer.beta2", "0.95"},
      {"optimizer.eps", "1e-06"},
      {"optimizer.weight_decay", "0.1"},
      {"optimizer.eps_form", "\"fairseq\""},
      {"optimizer.clip_norm", "1.0"},
      {"optimizer.optimistic", "true"},
      {"optimizer.warmup_updates", "50"},
      {"optimizer.decay", "\"cosine\""},
      {"optimizer.decay_updates", "500"},
      {"optimizer.min_lr", "1e-05"},
      {"optimizer.decay_power", "2.0"},
      {"train.updates", "2"},
      {"train.global_batch", "16"},
      {"train.micro_batch", "4"},
      {"train.precision", "\"bf16\""},
      {"train.recompute", "\"full\""},
      {"train.recompute_layers", "2"},
      {"train.seed", "42"},
      {"train.init_from", "\"runs/other\""},
      {"train.valid_every", "10"},
      {"train.valid_sequences", "100"},
      {"train.log_every", "7"},
      {"train.max_skipped", "3"},
      {"train.loss_scale_init", "256.0"},
      {"train.loss_scale_window", "100"},
      {"train.loss_scale_min", "0.5"},
      {"checkpoint.folder", "\"elsewhere\""},
      {"checkpoint.every", "11"},
      {"checkpoint.keep", "1"},
      {"checkpoint.keep_every", "1000"},
      {"checkpoint.async", "false"},
      {"checkpoint.staging_mib", "64.5"},
      {"checkpoint.on_failure", "\"stop\""},
      {"checkpoint.on_damage", "\"stop\""},
      {"health.watchdog_seconds", "60.5"},
      {"health.replica_check_every", "10"},
      {"health.straggler_factor", "2.5"},
      {"health.spike_zscore", "6.5"},
      {"health.spike_window", "64"},
      {"health.on_spike", "\"skip\""},
      {"health.on_nonfinite", "\"rollback\""},
      {"health.max_rollbacks", "5"},
      {"health.explosion_rise", "2.5"},
      {"metrics.gradient_norms_every", "1"},
      {"metrics.distributions_every", "1000"},
      {"metrics.tensorboard", "false"},
      {"device.kind", "\"cuda\""},
      {"device.tf32", "true"},
      {"device.tune_products", "false"},
      {"device.cuda_graphs", "true"},
      {"device.transport", "\"host\""},
      {"device.threads", "2"},
  };
  return values;
}

// What must stand beside a key's other value.
std::string start_of(const std::string& key) {
  const std::string data = "data.valid = 'v'\n";  // a validation needs a data set
  if (key == "data.valid") return "";
  if (key == "train.recompute_layers") return data + "train.recompute = 'selective'\n";
  if (key.starts_with("train.loss_scale")) return data + "train.precision = 'fp16'\n";
  if (key == "model.head") return "";
  if (key == "model.attention" || key == "model.classes" || key.ends_with("_labelled"))
    return "model.head = 'classification'\n";
  if (key == "parallel.split") return data + "model.layers = 12\nparallel.pipeline = 2\n";
  if (key == "parallel.virtual_stages" || key == "parallel.interleave_group")
    return data + "parallel.schedule = 'interleaved'\n";
  return data;
}

TEST(RunConfig, EachKeyIsReadAndWrittenByItself) {
  std::set<std::string> known;
  for (const ConfigKey& key : config_keys()) known.insert(key.name);
  for (const auto& [key, value] : other_values()) EXPECT_TRUE(known.contains(key)) << key;
  for (const std::string& key : known) {
    ASSERT_TRUE(other_values().contains(key)) << key << " is missing from the list above";
    const std::string value = other_values().at(key);
    const std::string start = start_of(key);
    const std::map<std::string, std::string> before = lines_by_key(to_toml(parse(start)));
    EXPECT_EQ(before.size(), known.size());
    const RunConfig changed = parse(start, {key + "=" + value});
    EXPECT_NE(changed, parse(start)) << key;
    EXPECT_EQ(parse(to_toml(changed)), changed) << key;
    std::map<std::string, std::string> expected = before;
    expected[key] = value;
    EXPECT_EQ(lines_by_key(to_toml(changed)), expected) << key;
    EXPECT_EQ(parse(start + key + " = " + value), changed) << "from a file: " << key;
  }
}

TEST(RunConfig, EveryKeyIsDescribed) {
  const std::string text = describe_config_keys();
  for (const ConfigKey& key : config_keys()) {
    EXPECT_THAT(text, HasSubstr(key.name + " = " + key.default_value + "\n"));
    EXPECT_FALSE(key.doc.empty()) << key.name;
  }
  EXPECT_THAT(text,
              HasSubstr("train.updates = 1000\n    updates of the run\n    an integer of at least 1\n"));
}

class ConfigFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "config_test_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return (folder_ / name).string();
  }

  std::string refusal(const std::string& path) const {
    try {
      load_run_config(path, {});
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  }

  std::filesystem::path folder_;
};

TEST_F(ConfigFile, IsReadWithOverrides) {
  const std::string path = write("a.toml", "[model]\nlayers = 3\nwidth = 128\n");
  const RunConfig c = load_run_config(path, {"model.layers=6"});
  EXPECT_EQ(c.model.layers, 6);
  EXPECT_EQ(c.model.width, 128);
}

TEST_F(ConfigFile, FilesOfOverridesReplaceInOrder) {
  const std::string path = write("a.toml", "[model]\nlayers = 3\nwidth = 128\n");
  const std::string over = write("b.toml", "[model]\nlayers = 5\n[parallel]\ntensor = 2\n");
  const RunConfig c = load_run_config(path, {"model.layers=4", "@" + over, "parallel.tensor=4"});
  EXPECT_EQ(c.model.layers, 5);
  EXPECT_EQ(c.model.width, 128);
  EXPECT_EQ(c.parallel.tensor, 4);
}

TEST_F(ConfigFile, ErrorsInFilesOfOverridesNameThem) {
  const std::string path = write("a.toml", "[model]\nlayers = 3\n");
  const std::string over = write("b.toml", "[model]\nlayer = 5\n");
  const auto complaint = [&](const std::string& override_text) -> std::string {
    try {
      load_run_config(path, {override_text});
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(complaint("@" + over), StartsWith(over + ":2:1: model.layer is not a key"));
  EXPECT_THAT(complaint("@" + over + "x"), StartsWith(over + "x: there is no such file"));
}

TEST_F(ConfigFile, ErrorsNameIt) {
  const std::string path = write("a.toml", "[model]\nlayers = -3\n");
  EXPECT_THAT(refusal(path), StartsWith(path + ":2:10: model.layers must be"));
}

TEST_F(ConfigFile, MissingOnesNameTheNearest) {
  const std::string path = write("small.toml", "");
  EXPECT_EQ(refusal((folder_ / "smal.toml").string()),
            (folder_ / "smal.toml").string() + ": there is no such file; did you mean " + path + "?");
  EXPECT_EQ(refusal((folder_ / "nothing" / "alike").string()),
            (folder_ / "nothing" / "alike").string() + ": there is no such file");
}

TEST_F(ConfigFile, FoldersAndLargeFilesAreRefused) {
  EXPECT_EQ(refusal(folder_.string()), folder_.string() + ": is a folder; name a TOML file");
  const std::string path = write("large.toml", std::string((1 << 20) + 1, '#'));
  EXPECT_EQ(refusal(path), path + ": is larger than a configuration may be (1048576 bytes)");
}

}  // namespace
}  // namespace normformer
