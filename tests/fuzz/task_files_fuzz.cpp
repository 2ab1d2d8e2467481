// A zero-shot task's items: the task, flags, a file of labels up to a zero byte where the flags say so, and
// the file.
#include "normformer/data/unicode.h"
#include "normformer/evaluation/task.h"

#include "fuzz.h"
#include "unit/data/temporary_folder.h"

using namespace normformer;

namespace {

bool is_text(std::string_view text) { return !find_invalid_utf8(text); }

// What whoever scores the items takes for granted.
void check_item(const TaskRule& rule, const TaskItem& item) {
  const size_t requests = item.requests.size();
  require(rule.kind == TaskKind::choice ? requests > 0 : requests == 1, "there is something to score");
  require(item.gold >= 0 && static_cast<size_t>(item.gold) < requests, "the right choice is one of them");
  require(item.lengths.size() == (rule.is_normalised ? requests : 0), "normalised choices have lengths");
  for (const int64_t length : item.lengths) require(length > 0, "no choice is empty");
  for (const ContinuationRequest& request : item.requests) {
    require(is_text(request.context) && is_text(request.continuation), "requests are UTF-8");
    require(request.continuation.starts_with(' '), "a continuation begins with a space");
  }
}

void check_beginning(const Task& few, const Task& all) {
  require(few.items.size() <= all.items.size(), "a limit adds no items");
  for (size_t i = 0; i < few.items.size(); ++i) {
    const TaskItem& mine = few.items[i];
    const TaskItem& other = all.items[i];
    require(mine.place == other.place && mine.requests == other.requests && mine.gold == other.gold,
            "a limit leaves the first items as they are");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  FuzzInput input(data, size);
  const TaskRule& rule = known_tasks()[input.byte() % known_tasks().size()];
  const uint8_t flags = input.byte();
  TaskSource source{std::string(rule.name), folder / "items", {}};
  if ((flags & 1) != 0) {
    source.labels = folder / "labels";
    write_bytes(source.labels, input.until('\0'));
  }
  write_bytes(source.file, input.rest());
  Task all;
  const bool is_good = takes([&] { all = read_task(source); });
  for (const TaskItem& item : all.items) check_item(rule, item);
  takes([&] {
    const int64_t limit = flags / 2 % 4 + 1;
    const Task few = read_task(source, limit);
    require(!few.items.empty() && static_cast<int64_t>(few.items.size()) <= limit, "the limit is kept");
    for (const TaskItem& item : few.items) check_item(rule, item);
    if (is_good) check_beginning(few, all);
  });
  return 0;
}
