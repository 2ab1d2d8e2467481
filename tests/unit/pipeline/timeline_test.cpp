#include "normformer/pipeline/timeline.h"

#include <cstdlib>
#include <limits>
#include <regex>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "lists.h"

namespace normformer {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

using Rows = std::vector<std::vector<TimedAction>>;

std::vector<std::smatch> all_matches(const std::string& text, const std::regex& pattern) {
  return {std::sregex_iterator(text.begin(), text.end(), pattern), std::sregex_iterator()};
}

// What is wrong with the text as XML, in the small part of XML that draw_svg writes; empty where nothing is.
std::string xml_fault(const std::string& text) {
  static const std::regex declaration(R"(^<\?xml version="1\.0" encoding="UTF-8"\?>\n)");
  static const std::regex content(R"((?:[^<&]|&(?:amp|lt|gt|quot);)*)");
  static const std::regex tag(R"(<(/?)([a-z]+)((?: [A-Za-z-]+="(?:[^"<&]|&(?:amp|lt|gt|quot);)*")*)(/?)>)");
  std::smatch match;
  if (!std::regex_search(text, match, declaration)) return "no declaration";
  std::vector<std::string> open;
  auto at = match[0].second;
  int roots = 0;
  while (at != text.end()) {
    if (!std::regex_search(at, text.end(), match, tag, std::regex_constants::match_continuous)) {
      if (!std::regex_search(at, text.end(), match, content, std::regex_constants::match_continuous) ||
          match.length() == 0)
        return "not XML: " + std::string(at, at + std::min<std::ptrdiff_t>(40, text.end() - at));
      if (open.empty() && match.str().find_first_not_of('\n') != std::string::npos) return "text outside";
    } else if (match.length(1) > 0) {
      if (open.empty() || open.back() != match.str(2)) return "closes " + match.str(2);
      open.pop_back();
    } else if (match.length(4) == 0) {
      if (open.empty()) ++roots;
      open.push_back(match.str(2));
    }
    at = match[0].second;
  }
  if (!open.empty()) return "does not close " + open.back();
  return roots == 1 ? "" : "more than one root";
}

TEST(Timeline, TheXmlCheckSeesFaults) {
  const std::string head = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
  EXPECT_EQ(xml_fault(head + "<a b=\"1\"><c/>x &amp; y</a>\n"), "");
  for (const std::string wrong : {"<a>", "<a></b>", "<a>x & y</a>", "<a>x < y</a>", "<a b=\"\"\"/>",
                                  "<a/><b></b><b></b>", "<a></a>x", "<a></a></a>"})
    EXPECT_NE(xml_fault(head + wrong), "") << wrong;
}

struct Box {
  double x, y, width, height;
  std::string color;
};

std::vector<Box> boxes(const std::string& svg, const std::string& name = "action") {
  static const std::string number = R"re(="([0-9.]+)" )re";
  const std::regex pattern("<rect class=\"" + name + "\" x" + number + "y" + number + "width" + number +
                           "height" + number + "fill=\"(#[0-9a-f]{6})\"");
  std::vector<Box> found;
  for (const auto& match : all_matches(svg, pattern))
    found.push_back({std::atof(match.str(1).c_str()), std::atof(match.str(2).c_str()),
                     std::atof(match.str(3).c_str()), std::atof(match.str(4).c_str()), match.str(5)});
  return found;
}

Rows simulated(const Schedule& schedule) {
  return simulate(schedule, equal_times(schedule.num_parts(), 1, 1, 1)).stages;
}

TEST(Timeline, EveryScheduleIsWellFormedWithABoxAnAction) {
  for (const Schedule& schedule :
       {gpipe_schedule(3, 4), one_f_one_b_schedule(1, 1), interleaved_schedule(4, 9, 3), zb_h1_schedule(4, 8),
        zb_h2_schedule(2, 120), zb_v_schedule(4, 10), zb_v_schedule(3, 0)}) {
    const std::string svg = draw_svg(simulated(schedule), "a schedule", "ms");
    EXPECT_EQ(xml_fault(svg), "");
    size_t actions = 0;
    for (const auto& list : schedule.stages) actions += list.size();
    EXPECT_EQ(boxes(svg).size(), actions);
    EXPECT_EQ(boxes(svg, "idle").size(), schedule.stages.size());
    EXPECT_THAT(svg, Not(HasSubstr("nan")));
    EXPECT_THAT(svg, Not(HasSubstr("inf")));
  }
}

TEST(Timeline, BoxesLieToScaleAndDoNotOverlap) {
  const Rows rows{{{{ActionKind::forward, 0}, 0, 2}, {{ActionKind::backward, 0}, 6, 10}},
                  {{{ActionKind::forward, 0}, 2, 3}, {{ActionKind::backward, 0}, 3, 6}}};
  const auto drawn = boxes(draw_svg(rows, "two ranks", "s"));
  ASSERT_EQ(drawn.size(), 4U);
  const double second = (drawn[1].x - drawn[0].x) / 6;  // in pixels
  const double starts[] = {0, 6, 2, 3};
  const double lengths[] = {2, 4, 1, 3};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(drawn[i].x, drawn[0].x + starts[i] * second, 0.02) << i;
    EXPECT_NEAR(drawn[i].width, lengths[i] * second - 1, 0.02) << i;  // and a pixel between neighbours
  }
  EXPECT_EQ(drawn[0].y, drawn[1].y);
  EXPECT_GT(drawn[2].y, drawn[0].y + drawn[0].height);
}

TEST(Timeline, ColorsTellKindsAndChunks) {
  const auto drawn = boxes(draw_svg({{{{ActionKind::forward, 0, 0}, 0, 1},
                                      {{ActionKind::forward, 0, 1}, 1, 2},
                                      {{ActionKind::forward, 1, 0}, 2, 3},
                                      {{ActionKind::backward, 0, 1}, 3, 4},
                                      {{ActionKind::backward_input, 0, 0}, 4, 5},
                                      {{ActionKind::backward_weight, 0, 0}, 5, 6}}},
                                    "kinds", "s"));
  ASSERT_EQ(drawn.size(), 6U);
  EXPECT_EQ(drawn[0].color, drawn[2].color);
  for (const size_t i : {1, 3, 4, 5})
    for (size_t j = 0; j < i; ++j) EXPECT_NE(drawn[i].color, drawn[j].color) << i << " " << j;
}

TEST(Timeline, TheLegendNamesWhatIsThere) {
  const std::string plain = draw_svg(simulated(one_f_one_b_schedule(2, 2)), "1F1B", "s");
  EXPECT_EQ(boxes(plain, "legend").size(), 2U);
  EXPECT_THAT(plain, HasSubstr(">forward</text>"));
  EXPECT_THAT(plain, HasSubstr(">backward</text>"));
  EXPECT_THAT(plain, Not(HasSubstr(">chunk 0</text>")));
  const std::string v = draw_svg(simulated(zb_v_schedule(2, 2)), "ZB-V", "s");
  EXPECT_EQ(boxes(v, "legend").size(), 5U);
  EXPECT_THAT(v, HasSubstr(">backward_input</text>"));
  EXPECT_THAT(v, HasSubstr(">backward_weight</text>"));
  EXPECT_THAT(v, HasSubstr(">chunk 1</text>"));
}

TEST(Timeline, TitleAxisAndNumbers) {
  const std::string svg = draw_svg(simulated(gpipe_schedule(2, 3)), "GPipe", "ms");
  EXPECT_THAT(svg, HasSubstr(">GPipe: 25.0% bubble</text>"));
  EXPECT_THAT(svg, HasSubstr(">time in ms</text>"));
  EXPECT_THAT(svg, HasSubstr(">rank 0</text>"));
  EXPECT_THAT(svg, HasSubstr(">rank 1</text>"));
  EXPECT_THAT(svg, HasSubstr("<title>backward of micro-batch 2: 10 to 12 ms</title>"));
  EXPECT_EQ(all_matches(svg, std::regex("text-anchor=\"middle\" fill=\"#ffffff\">[0-2]</text>")).size(), 12U);
}

TEST(Timeline, NumbersAreLeftOutWhereTheyDoNotFit) {
  const std::string svg =
      draw_svg({{{{ActionKind::forward, 12345678}, 0, 1}, {{ActionKind::forward, 7}, 1, 100}}}, "long", "s");
  EXPECT_THAT(svg, Not(HasSubstr(">12345678</text>")));
  EXPECT_THAT(svg, HasSubstr(">7</text>"));
  EXPECT_THAT(svg, HasSubstr("forward of micro-batch 12345678"));
}

TEST(Timeline, TextIsEscaped) {
  const std::string svg = draw_svg(simulated(gpipe_schedule(1, 1)), "a < b & \"c\" > d\x01", "<&>");
  EXPECT_EQ(xml_fault(svg), "");
  EXPECT_THAT(svg, HasSubstr(">a &lt; b &amp; &quot;c&quot; &gt; d : 0.0% bubble</text>"));
  EXPECT_THAT(svg, HasSubstr(">time in &lt;&amp;&gt;</text>"));
}

TEST(Timeline, ATraceBeginsWithItsFirstAction) {
  const double start = 1.7e9;
  const std::string late = draw_svg(
      {{{{ActionKind::forward, 0}, start, start + 1}}, {{{ActionKind::forward, 0}, start + 1, start + 2}}},
      "trace", "s");
  const std::string early =
      draw_svg({{{{ActionKind::forward, 0}, 0, 1}}, {{{ActionKind::forward, 0}, 1, 2}}}, "trace", "s");
  EXPECT_EQ(late, early);
}

TEST(Timeline, ImpossibleTimesAreRefused) {
  const auto draw = [](std::vector<TimedAction> row) { draw_svg({std::move(row)}, "wrong", "s"); };
  EXPECT_THROW(draw({{{}, 2, 1}}), LogicError);
  EXPECT_THROW(draw({{{}, 0, 2}, {{}, 1, 3}}), LogicError);
  EXPECT_THROW(draw({{{}, 0, std::numeric_limits<double>::infinity()}}), LogicError);
  EXPECT_THROW(draw({{{}, std::numeric_limits<double>::quiet_NaN(), 1}}), LogicError);
  EXPECT_THROW(draw({{{ActionKind::forward, 0, -1}, 0, 1}}), LogicError);
  EXPECT_THROW(draw({{{static_cast<ActionKind>(9), 0, 0}, 0, 1}}), LogicError);
  EXPECT_EQ(xml_fault(draw_svg({}, "nobody", "s")), "");
  EXPECT_EQ(xml_fault(draw_svg({{{{}, 3, 3}}}, "no time", "s")), "");
}

}  // namespace
}  // namespace normformer
