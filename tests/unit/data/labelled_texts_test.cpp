#include "normformer/data/labelled_texts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class LabelledTexts : public ::testing::Test {
 protected:
  std::filesystem::path file(const std::string& name, const std::string& content) const {
    write_bytes(folder_ / name, content);
    return folder_ / name;
  }

  std::vector<LabelledText> read(const std::string& name, const std::string& content,
                                 const LabelledFields& fields = {{"sentence"}, "label"}) const {
    return read_labelled_texts(file(name, content), fields);
  }

  /// What is said of a file that is refused.
  std::string refusal(const std::string& name, const std::string& content,
                      const LabelledFields& fields = {{"sentence"}, "label"}) const {
    try {
      read(name, content, fields);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }

  std::vector<std::string> names(const std::vector<std::string>& labels, int64_t classes) const {
    std::vector<LabelledText> texts;
    for (const std::string& label : labels) texts.push_back({{"text"}, label, 1});
    return class_names_of(texts, classes, "file.tsv");
  }

  TemporaryFolder folder_;
};

TEST_F(LabelledTexts, TsvColumnsAreFoundByTheirNames) {
  const auto texts = read(
      "a.tsv", "\xEF\xBB\xBFindex\tlabel\tsentence\n0\t1\tsome \"quoted\" text \n\n7\tno\t'\xC3\xA9\r\n");
  ASSERT_EQ(texts.size(), 2U);
  EXPECT_THAT(texts[0].texts, ElementsAre("some \"quoted\" text "));
  EXPECT_EQ(texts[0].label, "1");
  EXPECT_EQ(texts[0].line, 2);
  EXPECT_THAT(texts[1].texts, ElementsAre("'\xC3\xA9"));
  EXPECT_EQ(texts[1].label, "no");
  EXPECT_EQ(texts[1].line, 4);
}

TEST_F(LabelledTexts, PairsAndFilesWithoutLabels) {
  const auto texts = read("a.tsv", "q2\tx\tq1\nb\t0\ta", {{"q1", "q2"}, ""});
  ASSERT_EQ(texts.size(), 1U);
  EXPECT_THAT(texts[0].texts, ElementsAre("a", "b"));
  EXPECT_EQ(texts[0].label, "");
}

TEST_F(LabelledTexts, JsonHasStringsAndIntegersAsLabels) {
  const auto texts = read("a.jsonl",
                          "{\"sentence\": \"a\\tb\\n\", \"label\": -3, \"more\": [1]}\n \n"
                          "{\"label\": \"yes\", \"sentence\": \"c\"}");
  ASSERT_EQ(texts.size(), 2U);
  EXPECT_THAT(texts[0].texts, ElementsAre("a\tb\n"));
  EXPECT_EQ(texts[0].label, "-3");
  EXPECT_EQ(texts[1].label, "yes");
  EXPECT_EQ(texts[1].line, 3);
}

TEST_F(LabelledTexts, RefusesWithFileAndLine) {
  const std::string head = "sentence\tlabel\n";
  EXPECT_THAT(refusal("a.tsv", head + "x\t1\ny\n"), AllOf(HasSubstr("a.tsv line 3"), HasSubstr("1 columns")));
  EXPECT_THAT(refusal("a.tsv", head + "x\ty\t1\n"), AllOf(HasSubstr("a.tsv line 2"), HasSubstr("3 columns")));
  EXPECT_THAT(refusal("a.tsv", head + " \t1\n"),
              AllOf(HasSubstr("a.tsv line 2 has nothing"), HasSubstr("\"sentence\"")));
  EXPECT_THAT(refusal("a.tsv", head + "x\t\n"), AllOf(HasSubstr("line 2 has nothing"), HasSubstr("label")));
  EXPECT_THAT(refusal("a.tsv", head + "x\xFF\t1\n"), HasSubstr("a.tsv line 2 is not UTF-8"));
  EXPECT_THAT(refusal("a.tsv", "text\tlabel\nx\t1\n"),
              AllOf(HasSubstr("a.tsv line 1 names no column \"sentence\""), HasSubstr("text, label"),
                    HasSubstr("data.text_fields")));
  EXPECT_THAT(refusal("a.tsv", "sentence\tgold\nx\t1\n"), HasSubstr("data.label_field"));
  EXPECT_THAT(refusal("a.tsv", head), HasSubstr("has no texts"));
  EXPECT_THAT(refusal("a.tsv", ""), HasSubstr("has no texts"));
  EXPECT_THAT(refusal("a.csv", head + "x\t1\n"), HasSubstr("name a .tsv or a .jsonl"));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": \"x\", \"label\": 1}\n{"), HasSubstr("a.jsonl line 2"));
  EXPECT_THAT(refusal("a.jsonl", "[1]"), HasSubstr("line 1 is not a JSON object"));
  EXPECT_THAT(refusal("a.jsonl", "{\"label\": 1}"), HasSubstr("line 1 has no \"sentence\""));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": \"x\"}"), HasSubstr("line 1 has no \"label\""));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": 5, \"label\": 1}"), HasSubstr("is not a string"));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": \"x\", \"label\": 0.5}"), HasSubstr("nor an integer"));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": \"\", \"label\": 1}"), HasSubstr("line 1 has nothing"));
  EXPECT_THAT(refusal("a.jsonl", "{\"sentence\": \"x\", \"label\": \"\"}"), HasSubstr("line 1 has nothing"));
  EXPECT_THROW(read_labelled_texts(folder_ / "none.tsv", {{"sentence"}, "label"}), IoError);
}

TEST_F(LabelledTexts, ClassesAreInOrder) {
  EXPECT_THAT(names({"no", "yes", "no", "Yes"}, 0), ElementsAre("Yes", "no", "yes"));
  EXPECT_THAT(names({"10", "9", "-1", "9"}, 0), ElementsAre("-1", "9", "10"));
  EXPECT_THAT(names({"10", "9", "x"}, 3), ElementsAre("10", "9", "x"));
  EXPECT_THAT(names({"01", "1"}, 0), ElementsAre("01", "1"));
  // Numbers of classes, whether they all occur or not.
  EXPECT_THAT(names({"2", "0"}, 4), ElementsAre("0", "1", "2", "3"));
  EXPECT_THAT(names({"1"}, 2), ElementsAre("0", "1"));
  EXPECT_THAT(names({"1", "2"}, 2), ElementsAre("1", "2"));
}

TEST_F(LabelledTexts, ClassesMustBeSeveralAndAsManyAsAskedFor) {
  EXPECT_THROW(names({"a", "a"}, 0), DataError);
  EXPECT_THROW(names({"1"}, 0), DataError);
  EXPECT_THROW(names({"a", "b", "c"}, 2), DataError);
  EXPECT_THROW(names({"a", "b", "c"}, 4), DataError);
  EXPECT_THROW(names({"0", "3"}, 3), DataError);
}

TEST_F(LabelledTexts, NamesOfClassesAreReadAsWritten) {
  const std::vector<std::string> written{"a \"b\"\n", "\xC3\xA9", ""};
  write_class_names(folder_ / "classes.json", written);
  EXPECT_EQ(read_class_names(folder_ / "classes.json"), written);
  for (const char* hostile : {"", "{}", "[]", "[1]", "[\"a\""})
    EXPECT_THROW(read_class_names(file("hostile.json", hostile)), DataError) << hostile;
}

}  // namespace
}  // namespace normformer
