#include "task_items.h"

#include <algorithm>
#include <map>
#include <utility>

#include "normformer/core/error.h"
#include "normformer/data/unicode.h"

#include "python_text.h"

// Each function follows the harness' definition of its task (lm_eval/tasks of version 0.4.2), which is told
// in docs/evaluation.md.
namespace normformer {

namespace {

// The harness puts a space in front of each choice.
TaskItem choose_between(const Record& record, const std::string& context,
                        const std::vector<std::string>& choices, int64_t gold) {
  TaskItem item{.place = record.place(), .requests = {}, .lengths = {}, .gold = gold};
  for (const std::string& choice : choices) {
    if (choice.empty()) record.fail("has an empty choice");
    item.requests.push_back({context, fmt::format(" {}", choice)});
    item.lengths.push_back(length_in_characters(choice));
  }
  if (gold < 0 || gold >= static_cast<int64_t>(choices.size())) {
    record.fail(fmt::format("says that choice {} of {} is right, counted from 0", gold, choices.size()));
  }
  return item;
}

std::string cleaned(std::string_view text) {
  return replace_all(without_brackets(replace_all(strip(text), " [title]", ". ")), "  ", " ");
}

TaskItem hellaswag(const Record& record) {
  const bool is_whole = record.has("ctx") && !record.has("ctx_a");
  const std::string context =
      is_whole ? record.text("ctx")
               : fmt::format("{} {}", record.text("ctx_a"), capitalized(record.text("ctx_b")));
  std::vector<std::string> endings;
  for (const std::string& ending : record.texts("endings")) endings.push_back(cleaned(ending));
  return choose_between(record, cleaned(fmt::format("{}: {}", record.text("activity_label"), context)),
                        endings, record.number("label"));
}

TaskItem piqa(const Record& record) {
  return choose_between(record, fmt::format("Question: {}\nAnswer:", record.text("goal")),
                        {record.text("sol1"), record.text("sol2")}, record.number("label"));
}

// Which of two choices is right, which the file counts from 1.
int64_t one_or_two(const Record& record, const std::string& key) {
  const int64_t number = record.number(key);
  if (number != 1 && number != 2) record.fail(fmt::format("has the \"{}\" {}, not 1 or 2", key, number));
  return number - 1;
}

// The choices are contexts here, and what follows them is the same.
TaskItem winogrande(const Record& record) {
  const std::string sentence = record.text("sentence");
  const std::size_t blank = sentence.find('_');
  if (blank == std::string::npos) record.fail("has no \"_\" in its \"sentence\"");
  TaskItem item{.place = record.place(), .requests = {}, .lengths = {}, .gold = one_or_two(record, "answer")};
  for (const char* option : {"option1", "option2"}) {
    item.requests.push_back({sentence.substr(0, blank) + record.text(option),
                             fmt::format(" {}", strip(std::string_view(sentence).substr(blank + 1)))});
  }
  return item;
}

struct LetteredChoices {
  std::vector<std::string> texts;
  std::vector<std::string> labels;
};

// As published, [{"text": ..., "label": "A"}, ...], or as the data sets library has it, {"text": [...],
// "label":
// [...]}.
LetteredChoices lettered_choices(const Record& record) {
  LetteredChoices choices;
  if (!record.is_list("choices")) {
    const Record lists = record.object("choices");
    return {lists.texts("text"), lists.texts("label")};
  }
  for (const Record& choice : record.objects("choices")) {
    choices.texts.push_back(choice.text("text"));
    choices.labels.push_back(choice.text("label"));
  }
  return choices;
}

int64_t place_of(const Record& record, const std::vector<std::string>& labels, std::string_view label) {
  const auto found = std::find(labels.begin(), labels.end(), label);
  if (found == labels.end())
    record.fail(fmt::format("has the \"answerKey\" \"{}\" but no such choice", label));
  return found - labels.begin();
}

TaskItem openbookqa(const Record& record) {
  if (record.has("query")) {
    return choose_between(record, record.text("query"), record.texts("choices"), record.number("gold"));
  }
  const bool is_flat = record.has("question_stem");
  const Record question = is_flat ? record : record.object("question");
  const LetteredChoices choices = lettered_choices(question);
  const std::string key = record.text("answerKey");
  const std::string_view label =
      std::string_view(key).substr(std::min(key.size(), key.find_first_not_of(' ')));
  return choose_between(record, question.text(is_flat ? "question_stem" : "stem"), choices.texts,
                        place_of(record, choices.labels, label));
}

TaskItem arc(const Record& record) {
  const bool is_flat = record.has("choices");
  const Record question = is_flat ? record : record.object("question");
  const LetteredChoices choices = lettered_choices(question);
  return choose_between(record,
                        fmt::format("Question: {}\nAnswer:", question.text(is_flat ? "question" : "stem")),
                        choices.texts, place_of(record, choices.labels, record.text("answerKey")));
}

TaskItem storycloze(const Record& record) {
  std::string story = record.text("InputSentence1");
  for (const char* sentence : {"InputSentence2", "InputSentence3", "InputSentence4"}) {
    story += fmt::format(" {}", record.text(sentence));
  }
  return choose_between(record, story,
                        {record.text("RandomFifthSentenceQuiz1"), record.text("RandomFifthSentenceQuiz2")},
                        one_or_two(record, "AnswerRightEnding"));
}

// The harness writes a space of its own in front of each choice, and so two in all.
TaskItem cause_or_effect(const Record& record, std::string_view premise, const std::string& connector,
                         const std::vector<std::string>& choices, int64_t gold) {
  std::vector<std::string> ends;
  for (const std::string& choice : choices) {
    if (choice.empty()) record.fail("has an empty choice");
    ends.push_back(fmt::format(" {}", with_small_first(choice)));
  }
  const std::string context = fmt::format("{} {}", without_last_character(premise), connector);
  return choose_between(record, context, ends, gold);
}

TaskItem copa_of_query(const Record& record) {
  const std::string query = record.text("query");
  for (const std::string connector : {"because", "therefore"}) {
    if (!query.ends_with(fmt::format(", {}", connector))) continue;
    const auto premise = std::string_view(query).substr(0, query.size() - connector.size() - 1);
    return cause_or_effect(record, premise, connector, record.texts("choices"), record.number("gold"));
  }
  record.fail("has a \"query\" that ends neither with \", because\" nor with \", therefore\"");
}

TaskItem copa(const Record& record) {
  if (record.has("query")) return copa_of_query(record);
  const std::string question = record.text("question");
  if (question != "cause" && question != "effect") {
    record.fail(fmt::format("asks for the \"{}\", not for a cause or an effect", question));
  }
  return cause_or_effect(record, strip(record.text("premise")), question == "cause" ? "because" : "therefore",
                         {record.text("choice1"), record.text("choice2")}, record.number("label"));
}

TaskItem lambada(const Record& record) {
  const std::string text = record.has("continuation")
                               ? fmt::format("{} {}", record.text("context"), record.text("continuation"))
                               : record.text("text");
  const std::size_t space = text.rfind(' ');
  const bool is_one_word = space == std::string::npos;
  TaskItem item{.place = record.place(), .requests = {}, .lengths = {}, .gold = 0};
  item.requests.push_back({is_one_word ? "" : text.substr(0, space),
                           is_one_word ? fmt::format(" {}", text) : text.substr(space)});
  return item;
}

}  // namespace

ItemMaker item_maker(std::string_view task) {
  static const std::map<std::string_view, ItemMaker> makers{
      {"hellaswag", hellaswag},
      {"piqa", piqa},
      {"winogrande", winogrande},
      {"openbookqa", openbookqa},
      {"arc_easy", arc},
      {"arc_challenge", arc},
      {"storycloze_2016", storycloze},
      {"storycloze_2018", storycloze},
      {"copa", copa},
      {"lambada_openai", lambada},
      {"lambada_standard", lambada},
  };
  const auto found = makers.find(task);
  NF_CHECK(found != makers.end(), "no task {}", task);
  return found->second;
}

}  // namespace normformer
