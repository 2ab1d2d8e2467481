#include "normformer/pipeline/timeline.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

using Rows = std::vector<std::vector<TimedAction>>;

// All in pixels.
constexpr double kMargin = 12;
constexpr double kLeft = 76;  // names of ranks
constexpr double kLegendY = 44;
constexpr double kTop = 68;
constexpr double kRowHeight = 28;
constexpr double kRowStep = 34;
constexpr double kCharacter = 7.2;  // a letter's width, of the larger ones
constexpr double kBox = 36;         // what the mean box should have, so that numbers fit
constexpr double kTick = 70;        // what lies between ticks, at least

struct Color {
  double red, green, blue;
};

constexpr Color kGrey{110, 110, 110};

Color color_of(ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return {43, 108, 176};
    case ActionKind::backward:
      return {20, 118, 92};
    case ActionKind::backward_input:
      return {176, 74, 20};
    case ActionKind::backward_weight:
      return {122, 64, 160};
  }
  return kGrey;
}

// Towards white from the first chunk to the last.
Color shade(Color color, int64_t chunk, int64_t chunks) {
  const double white = chunks > 1 ? 0.7 * static_cast<double>(chunk) / static_cast<double>(chunks - 1) : 0;
  const auto mix = [&](double part) { return part + (255 - part) * white; };
  return {mix(color.red), mix(color.green), mix(color.blue)};
}

std::string hex(Color color) {
  return fmt::format("#{:02x}{:02x}{:02x}", std::lround(color.red), std::lround(color.green),
                     std::lround(color.blue));
}

// White on dark, black on light.
std::string_view text_on(Color color) {
  return 0.299 * color.red + 0.587 * color.green + 0.114 * color.blue < 140 ? "#ffffff" : "#000000";
}

// As XML text; what XML cannot hold becomes a blank.
std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return result;
}

// What the picture has to show.
struct Extent {
  double begin = std::numeric_limits<double>::infinity();
  double end = -std::numeric_limits<double>::infinity();
  double busy = 0;
  int64_t actions = 0;
  int64_t chunks = 1;
  std::array<bool, 4> has_kind{};

  double span() const { return actions > 0 ? end - begin : 0; }
};

Extent extent_of(const Rows& rows) {
  Extent extent;
  for (const auto& row : rows) {
    double last = -std::numeric_limits<double>::infinity();
    for (const TimedAction& timed : row) {
      NF_CHECK(std::isfinite(timed.start) && std::isfinite(timed.end) && timed.start <= timed.end,
               "{} from {} to {}", to_string(timed.action), timed.start, timed.end);
      NF_CHECK(timed.start >= last, "{} begins at {}, before {}, when its rank is free",
               to_string(timed.action), timed.start, last);
      const auto kind = static_cast<size_t>(timed.action.kind);
      NF_CHECK(timed.action.chunk >= 0, "{} of a negative chunk", to_string(timed.action));
      NF_CHECK(kind < extent.has_kind.size(), "an action of unknown kind {}", kind);
      last = timed.end;
      extent.begin = std::min(extent.begin, timed.start);
      extent.end = std::max(extent.end, timed.end);
      extent.busy += timed.end - timed.start;
      ++extent.actions;
      extent.chunks = std::max(extent.chunks, timed.action.chunk + 1);
      extent.has_kind[kind] = true;
    }
  }
  return extent;
}

// 1, 2 or 5 times a power of ten, at least `least`.
double round_step(double least) {
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least) return factor * power;
  return 10 * power;
}

class Picture {
 public:
  Picture(const Rows& rows, std::string_view title, std::string_view unit)
      : rows_(rows),
        extent_(extent_of(rows)),
        title_(fmt::format("{}: {:.1f}% bubble", escaped(title), 100 * bubble_fraction(rows))),
        unit_(escaped(unit)) {
    const double mean = extent_.busy / static_cast<double>(std::max<int64_t>(extent_.actions, 1));
    plot_width_ = std::clamp(mean > 0 ? kBox * extent_.span() / mean : 0, 600.0, 20000.0);
    scale_ = extent_.span() > 0 ? plot_width_ / extent_.span() : 0;
  }

  std::string draw() {
    add_legend();
    for (size_t rank = 0; rank < rows_.size(); ++rank) add_row(rank);
    add_axis();
    return framed();
  }

 private:
  double x(double time) const { return kLeft + (time - extent_.begin) * scale_; }
  double bottom() const { return kTop + kRowStep * static_cast<double>(rows_.size()); }

  void add_text(double x, double y, std::string_view anchor, std::string_view text,
                std::string_view fill = "#000000") {
    body_ += fmt::format("<text x=\"{:.2f}\" y=\"{:.2f}\" text-anchor=\"{}\" fill=\"{}\">{}</text>\n", x, y,
                         anchor, fill, text);
  }

  void add_swatch(double& x, Color color, const std::string& name) {
    body_ += fmt::format(
        "<rect class=\"legend\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"14\" height=\"14\" fill=\"{}\"/>\n", x,
        kLegendY - 11, hex(color));
    add_text(x + 19, kLegendY + 1, "start", name);
    x += 19 + kCharacter * static_cast<double>(name.size()) + 14;
  }

  void add_legend() {
    double x = kLeft;
    for (size_t kind = 0; kind < extent_.has_kind.size(); ++kind)
      if (extent_.has_kind[kind])
        add_swatch(x, color_of(static_cast<ActionKind>(kind)),
                   std::string(name_of(static_cast<ActionKind>(kind))));
    for (int64_t c = 0; extent_.chunks > 1 && c < extent_.chunks; ++c)
      add_swatch(x, shade(kGrey, c, extent_.chunks), fmt::format("chunk {}", c));
    legend_end_ = x;
  }

  void add_row(size_t rank) {
    const double y = kTop + kRowStep * static_cast<double>(rank);
    add_text(kLeft - 8, y + kRowHeight / 2 + 4, "end", fmt::format("rank {}", rank));
    body_ += fmt::format(
        "<rect class=\"idle\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" "
        "fill=\"#ececec\"/>\n",
        kLeft, y, plot_width_, kRowHeight);
    for (const TimedAction& timed : rows_[rank]) add_box(timed, y);
  }

  void add_box(const TimedAction& timed, double y) {
    const Color color = shade(color_of(timed.action.kind), timed.action.chunk, extent_.chunks);
    const double width = (timed.end - timed.start) * scale_;
    const double gap = width > 4 ? 1 : 0;  // so that equal neighbours are told apart
    body_ += fmt::format(
        "<rect class=\"action\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" fill=\"{}\">"
        "<title>{}: {:g} to {:g} {}</title></rect>\n",
        x(timed.start), y, width - gap, kRowHeight, hex(color), to_string(timed.action),
        timed.start - extent_.begin, timed.end - extent_.begin, unit_);
    const std::string number = std::to_string(timed.action.micro_batch);
    if (width >= kCharacter * static_cast<double>(number.size()) + 3)
      add_text(x(timed.start) + width / 2, y + kRowHeight / 2 + 4, "middle", number, text_on(color));
  }

  void add_axis() {
    const double y = bottom();
    body_ += fmt::format("<path d=\"M{:.2f} {:.2f}H{:.2f}\" stroke=\"#000000\"/>\n", kLeft, y,
                         kLeft + plot_width_);
    if (scale_ > 0) {
      const double step = round_step(kTick / scale_);
      for (int64_t i = 0; static_cast<double>(i) * step <= extent_.span(); ++i)
        add_tick(static_cast<double>(i) * step, y);
    }
    add_text(kLeft, y + 38, "start", "time in " + unit_);
  }

  void add_tick(double time, double y) {
    const double at = x(extent_.begin + time);
    body_ += fmt::format("<path d=\"M{:.2f} {:.2f}v5\" stroke=\"#000000\"/>\n", at, y);
    add_text(at, y + 19, "middle", fmt::format("{:g}", time));
  }

  std::string framed() const {
    const double title_end = kMargin + 1.4 * kCharacter * static_cast<double>(title_.size());
    const double width = std::max({kLeft + plot_width_ + 2 * kMargin, legend_end_, title_end});
    const double height = bottom() + 38 + kMargin;
    return fmt::format(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
        "viewBox=\"0 0 {0:.0f} {1:.0f}\" font-family=\"sans-serif\" font-size=\"12\">\n"
        "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        "<text x=\"{2:.2f}\" y=\"24\" font-size=\"16\" font-weight=\"bold\">{3}</text>\n"
        "{4}</svg>\n",
        width, height, kMargin, title_, body_);
  }

  const Rows& rows_;
  Extent extent_;
  std::string title_;
  std::string unit_;
  double plot_width_ = 0;
  double scale_ = 0;  // pixels a unit of time
  double legend_end_ = 0;
  std::string body_;
};

}  // namespace

std::string draw_svg(const Rows& rows, std::string_view title, std::string_view unit) {
  return Picture(rows, title, unit).draw();
}

}  // namespace normformer
