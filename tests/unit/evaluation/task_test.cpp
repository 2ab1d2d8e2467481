#include "normformer/evaluation/task.h"

#include <fstream>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/evaluation/task_scores.h"

#include "evaluation/csv.h"
#include "evaluation/python_random.h"
#include "evaluation/python_text.h"

namespace normformer {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

std::filesystem::path fixtures() { return NORMFORMER_TEST_FIXTURES; }

Json read_json(const std::filesystem::path& path) { return Json::parse(std::ifstream(path)); }

// Recorded from lm-evaluation-harness by tests/peers/record_harness_requests.py.
const Json& recorded() {
  static const Json all = read_json(fixtures() / "evaluation" / "harness.json");
  return all;
}

Task task_of(const Json& file) {
  const auto folder = fixtures() / "evaluation";
  TaskSource source{file["task"], folder / file["file"].get<std::string>(), {}};
  if (file.contains("labels")) source.labels = folder / file["labels"].get<std::string>();
  return read_task(source);
}

std::vector<ContinuationScore> scores_of(const Json& item) {
  std::vector<ContinuationScore> scores;
  for (const Json& score : item["scores"]) scores.push_back({score[0], score[1], 1});
  return scores;
}

TEST(Tasks, MakeTheHarnessRequests) {
  for (const Json& file : recorded()["files"]) {
    const Task task = task_of(file);
    ASSERT_EQ(task.items.size(), file["items"].size()) << file["file"];
    for (size_t i = 0; i < task.items.size(); ++i) {
      const Json& expected = file["items"][i];
      EXPECT_EQ(task.items[i].gold, expected["gold"].get<int64_t>()) << file["file"] << i;
      ASSERT_EQ(task.items[i].requests.size(), expected["requests"].size()) << file["file"] << i;
      for (size_t r = 0; r < task.items[i].requests.size(); ++r) {
        const Json& request = expected["requests"][r];
        EXPECT_EQ(task.items[i].requests[r].context, request[0].get<std::string>());
        EXPECT_EQ(task.items[i].requests[r].continuation, request[1].get<std::string>());
      }
    }
  }
}

TEST(Tasks, MakeTheHarnessNumbersOfScores) {
  Context context(DeviceKind::cpu, 2);
  for (const Json& file : recorded()["files"]) {
    const Task task = task_of(file);
    std::vector<ContinuationScore> scores;
    for (const Json& item : file["items"]) {
      for (const ContinuationScore& score : scores_of(item)) scores.push_back(score);
    }
    const std::vector<TaskMetric> metrics = task_metrics(context, task, scores);
    EXPECT_EQ(file["numbers"].size(), 2 * metrics.size()) << file["file"];
    for (const TaskMetric& metric : metrics) {
      const auto expected = file["numbers"][metric.name + ",none"].get<double>();
      EXPECT_NEAR(metric.value, expected, 1e-14 * expected) << file["file"] << metric.name;
      const Json& error = file["numbers"][metric.name + "_stderr,none"];
      ASSERT_EQ(metric.standard_error.has_value(), error.is_number()) << file["file"] << metric.name;
      if (error.is_number()) {
        EXPECT_NEAR(*metric.standard_error, error.get<double>(), 1e-12 * error.get<double>()) << metric.name;
      }
    }
  }
}

TEST(Tasks, TakeTheFirstItemsOnly) {
  const auto file = fixtures() / "evaluation" / "piqa.jsonl";
  EXPECT_EQ(read_task({"piqa", file, fixtures() / "evaluation" / "piqa-labels.lst"}, 2).items.size(), 2u);
  EXPECT_EQ(read_task({"storycloze_2016", fixtures() / "evaluation" / "storycloze.csv", {}}, 1).items.size(),
            1u);
}

TEST(Tasks, AreNamedWithTheirFiles) {
  const TaskSource piqa = parse_task_source("piqa=a,b.jsonl,c.lst");
  EXPECT_EQ(piqa.file, "a,b.jsonl");
  EXPECT_EQ(piqa.labels, "c.lst");
  EXPECT_EQ(parse_task_source("copa=a,b=c.jsonl").file, "a,b=c.jsonl");
  for (const char* wrong : {"hellaswag", "hellaswag=", "helaswag=x", "=x", ""}) {
    EXPECT_THROW(parse_task_source(wrong), ConfigError) << wrong;
  }
}

class TaskFile : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }

  // What is said of a file with this text.
  std::string said(const std::string& task, const std::string& text) {
    std::ofstream(path_) << text;
    try {
      read_task({task, path_, {}});
    } catch (const DataError& e) {
      return e.what();
    }
    return "nothing";
  }

  std::filesystem::path path_ = std::filesystem::path(testing::TempDir()) / "task_test.jsonl";
};

TEST_F(TaskFile, OfWrongItemsSaysFileLineAndWhatIsWrong) {
  const std::string good = R"({"goal": "a", "sol1": "b", "sol2": "c", "label": 1})"
                           "\n";
  const std::vector<std::pair<std::string, std::string>> cases{
      {R"({"goal": "a", "sol1": "b", "label": 1})", R"(has no "sol2" (it has "goal", "label", "sol1"))"},
      {R"({"goal": 1, "sol1": "b", "sol2": "c", "label": 1})", R"(has no text under "goal", but 1)"},
      {R"({"goal": "a", "sol1": "b", "sol2": "c", "label": 2})", "says that choice 2 of 2 is right"},
      {R"({"goal": "a", "sol1": "b", "sol2": "c", "label": -1})", "says that choice -1 of 2 is right"},
      {R"({"goal": "a", "sol1": "b", "sol2": "c", "label": "one"})", R"(has no whole number under "label")"},
      {R"({"goal": "a", "sol1": "b", "sol2": "c", "label": 0.5})", R"(has no whole number under "label")"},
      {R"({"goal": "a", "sol1": "", "sol2": "c", "label": 0})", "has an empty choice"},
      {R"([1])", "is not a JSON object"},
      {R"({"goal": )", "is not valid JSON"},
      {"{\"goal\": \"\xff\"}", "is not valid JSON"},
  };
  for (const auto& [line, what] : cases) {
    EXPECT_THAT(said("piqa", good + "\n" + line + "\n"), HasSubstr(path_.string() + " line 3 " + what));
  }
  EXPECT_EQ(said("piqa", good), "nothing");
  EXPECT_THAT(said("piqa", ""), HasSubstr("has no items"));
}

TEST_F(TaskFile, OfEachTaskIsCheckedForItsOwnRules) {
  const std::vector<std::array<std::string, 3>> cases{
      {"winogrande", R"({"sentence": "a b", "option1": "a", "option2": "b", "answer": "1"})", R"(no "_")"},
      {"winogrande", R"({"sentence": "a _", "option1": "a", "option2": "b", "answer": ""})", "whole number"},
      {"winogrande", R"({"sentence": "a _", "option1": "a", "option2": "b", "answer": "3"})", "not 1 or 2"},
      {"copa", R"({"premise": "a.", "choice1": "b", "choice2": "c", "question": "why", "label": 0})",
       "the \"why\""},
      {"copa", R"({"premise": "a.", "choice1": "", "choice2": "c", "question": "cause", "label": 0})",
       "empty"},
      {"copa", R"({"query": "a, but", "choices": ["b"], "gold": 0})", "\", because\""},
      {"arc_easy",
       R"({"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "B"})",
       "no such choice"},
      {"openbookqa", R"({"question": "a", "answerKey": "B"})", R"(no object under "question")"},
      {"hellaswag", R"({"activity_label": "a", "ctx": "b", "endings": ["c", 1], "label": 0})",
       "list of texts"},
      {"hellaswag", R"({"activity_label": "a", "ctx": "b", "endings": ["c", "[d]"], "label": 0})",
       "empty choice"},
      {"lambada_openai", R"({"words": "a"})", R"(no "text")"},
      {"storycloze_2016", "InputSentence1,AnswerRightEnding\na,b,c",
       "has 3 fields, and the first line names 2"},
      {"storycloze_2016", "InputSentence1,AnswerRightEnding\na,1", R"(has no "InputSentence2")"},
      {"storycloze_2016",
       "InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
       "RandomFifthSentenceQuiz2,AnswerRightEnding\na,b,c,d,e,f,-9223372036854775808",
       R"(the "AnswerRightEnding" -9223372036854775808, not 1 or 2)"},
      {"storycloze_2016", "InputSentence1\n\"a", "line 2: a quote is opened"},
      {"storycloze_2016", "InputSentence1\n\xff", "is not UTF-8 at byte 15"},
  };
  for (const auto& [task, text, what] : cases) EXPECT_THAT(said(task, text), HasSubstr(what)) << task;
}

TEST_F(TaskFile, OfLabelsThatAreNoTextIsRefused) {
  std::ofstream(path_) << "0\n\xff\n0\n1\n";
  try {
    read_task({"piqa", fixtures() / "evaluation" / "piqa.jsonl", path_});
    FAIL();
  } catch (const DataError& e) {
    EXPECT_EQ(e.what(), path_.string() + " is not UTF-8 at byte 2");
  }
}

TEST_F(TaskFile, OfLabelsMustFitTheItems) {
  const auto items = fixtures() / "evaluation" / "piqa.jsonl";
  for (const char* labels : {"0\n1\n0\n", "0\n1\n0\n1\n1\n"}) {
    std::ofstream(path_) << labels;
    EXPECT_THROW(read_task({"piqa", items, path_}), DataError);
  }
  std::ofstream(path_) << "0\n1\n0\n1\n1\n";
  EXPECT_EQ(read_task({"piqa", items, path_}, 3).items[1].gold, 1);
}

TEST(PythonText, StripsWhatPythonStrips) {
  const Json recorded = read_json(fixtures() / "data" / "python_text.json");
  for (const Json& test : recorded["stripped"]) {
    const auto text = test["text"].get<std::string>();
    EXPECT_EQ(strip(text), test["strip"].get<std::string>()) << test;
    EXPECT_EQ(strip_end(text), test["rstrip"].get<std::string>()) << test;
  }
}

TEST(PythonText, CountsAndCutsCharacters) {
  EXPECT_EQ(length_in_characters("a\u00e9\u4e2d\U0001f600"), 4);
  EXPECT_EQ(without_last_character("a\U0001f600"), "a");
  EXPECT_EQ(without_last_character(""), "");
  EXPECT_EQ(replace_all("a    b   c", "  ", " "), "a  b  c");
}

// re.sub(r"\[.*?\]", "", text) of Python 3.11.
TEST(PythonText, GoesWithoutBracketsAsPythonDoes) {
  const std::vector<std::array<std::string, 2>> cases{
      {"a [b] c", "a  c"}, {"[a[b]c]", "c]"},           {"[]", ""},
      {"]a[", "]a["},      {"[a\n[b]]\n[", "[a\n]\n["}, {"[[a\nb]c[d]e", "[[a\nb]ce"}};
  for (const auto& [text, expected] : cases) EXPECT_EQ(without_brackets(text), expected) << text;
  const std::string open(1 << 22, '[');  // quadratic time would be hours
  EXPECT_EQ(without_brackets(open), open);
}

// random.seed(i); [random.random() for _ in range(1000)] of Python 3.11: the first, the second and the last.
TEST(PythonRandom, IsPythons) {
  const std::vector<std::array<double, 3>> expected{
      {{0.8444218515250481, 0.7579544029403025, 0.4804125346981437}},
      {{0.13436424411240122, 0.8474337369372327, 0.7062615472551386}},
      {{0.9560342718892494, 0.9478274870593494, 0.9214110288903143}}};
  for (uint32_t seed = 0; seed < expected.size(); ++seed) {
    PythonRandom random(seed);
    std::vector<double> drawn(1000);
    for (double& value : drawn) value = random.next();
    EXPECT_EQ((std::array{drawn[0], drawn[1], drawn[999]}), expected[seed]) << seed;
  }
}

TEST(Csv, ReadsQuotesAndEmptyFields) {
  const std::vector<CsvRow> rows = read_csv("a, \"b\"\"\n,c\" ,\r\n\r\n\n,\nx", "t");
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[0].fields, (std::vector<std::string>{"a", "b\"\n,c ", ""}));
  EXPECT_EQ(rows[1].fields, (std::vector<std::string>{"", ""}));
  EXPECT_EQ(rows[1].line, 5);
  EXPECT_EQ(rows[2].fields, std::vector<std::string>{"x"});
}

}  // namespace
}  // namespace normformer
