#include "normformer/comm/launch_order.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <source_location>
#include <tuple>

#include <fmt/ranges.h>

#include "normformer/comm/ledger_file.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// A group, its members here as indices of the ranks that were given.
struct KnownGroup {
  const GroupMembers* members;
  std::vector<size_t> present;
  std::vector<bool> is_present;  // by index
};

using Channel = std::tuple<size_t, int, int, int>;  // group, sender, receiver (both in the group), tag

[[noreturn]] void fail(const std::string& what) { throw LogicError(what, std::source_location::current()); }

std::string describe(const TrafficEvent& event) {
  std::string what = fmt::format("{} of {} bytes", event.kind, event.bytes);
  if (event.kind == "broadcast") what += fmt::format(" from its rank {}", event.peer);
  if (is_message(event.kind))
    what +=
        fmt::format(" {} its rank {}, tag {},", event.kind == "send" ? "to" : "from", event.peer, event.tag);
  return fmt::format("{} in group {} of ranks {}", what, event.group->name,
                     fmt::join(event.group->world_ranks, ", "));
}

class Launches {
 public:
  explicit Launches(std::span<const RankEvents> ranks) : ranks_(ranks) {
    for (const RankEvents& rank : ranks) {
      index_of_[rank.rank] = groups_of_.size();
      groups_of_.emplace_back();
    }
    NF_CHECK(index_of_.size() == ranks.size(), "a rank's calls are given twice");
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (const TrafficEvent& event : ranks[r].events) groups_of_[r].push_back(number_of(event));
    }
  }

  void check() {
    for (size_t a = 0; a < ranks_.size(); ++a) {
      for (size_t b = a + 1; b < ranks_.size(); ++b) check_pair(a, b);
    }
    check_messages();
    check_progress();
  }

 private:
  size_t number_of(const TrafficEvent& event) {
    const auto known = known_.find(event.group.get());
    if (known != known_.end()) return known->second;
    const auto [same, is_new] =
        by_members_.try_emplace({event.group->name, event.group->world_ranks}, groups_.size());
    if (is_new) {
      KnownGroup group{event.group.get(), {}, std::vector<bool>(ranks_.size(), false)};
      for (const int member : event.group->world_ranks) {
        const auto found = index_of_.find(member);
        if (found == index_of_.end()) continue;
        group.present.push_back(found->second);
        group.is_present[found->second] = true;
      }
      groups_.push_back(std::move(group));
    }
    known_.emplace(event.group.get(), same->second);
    return same->second;
  }

  const TrafficEvent& event(size_t rank, size_t position) const { return ranks_[rank].events[position]; }
  size_t size(size_t rank) const { return ranks_[rank].events.size(); }

  // A rank's next collective from `position` on that it shares with `other`; its size where there is none.
  size_t next_shared(size_t rank, size_t other, size_t position) const {
    while (position < size(rank) &&
           (is_message(event(rank, position).kind) || !groups_[groups_of_[rank][position]].is_present[other]))
      ++position;
    return position;
  }

  bool are_alike(size_t a, size_t i, size_t b, size_t j) const {
    const TrafficEvent& x = event(a, i);
    const TrafficEvent& y = event(b, j);
    return groups_of_[a][i] == groups_of_[b][j] && x.kind == y.kind && x.peer == y.peer &&
           (x.bytes == y.bytes || x.kind == "control");
  }

  std::string does(size_t rank, size_t position) const {
    if (position >= size(rank)) return fmt::format("rank {} makes no more such calls", ranks_[rank].rank);
    return fmt::format("rank {} with its call {} does {}", ranks_[rank].rank, position,
                       describe(event(rank, position)));
  }

  void check_pair(size_t a, size_t b) const {
    size_t i = next_shared(a, b, 0);
    size_t j = next_shared(b, a, 0);
    for (int64_t shared = 0; i < size(a) || j < size(b); ++shared) {
      if (i == size(a) || j == size(b) || !are_alike(a, i, b, j))
        fail(fmt::format("ranks {} and {} do not agree on collective {} of those that they share: {}, {}",
                         ranks_[a].rank, ranks_[b].rank, shared, does(a, i), does(b, j)));
      i = next_shared(a, b, i + 1);
      j = next_shared(b, a, j + 1);
    }
  }

  // The channel of a message and the index of the rank at its other end; none where that was not given.
  std::optional<std::pair<Channel, size_t>> channel_of(size_t rank, size_t position) const {
    const TrafficEvent& e = event(rank, position);
    const std::vector<int>& members = e.group->world_ranks;
    const auto other = index_of_.find(members.at(static_cast<size_t>(e.peer)));
    if (other == index_of_.end()) return std::nullopt;
    const auto me =
        static_cast<int>(std::find(members.begin(), members.end(), ranks_[rank].rank) - members.begin());
    const size_t group = groups_of_[rank][position];
    if (e.kind == "send") return {{{group, me, e.peer, e.tag}, other->second}};
    return {{{group, e.peer, me, e.tag}, other->second}};
  }

  void check_messages() const {
    struct End {
      size_t rank = 0;
      std::vector<size_t> positions = {};
    };
    std::map<Channel, std::pair<End, End>> channels;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      for (size_t i = 0; i < size(r); ++i) {
        if (!is_message(event(r, i).kind)) continue;
        const auto channel = channel_of(r, i);
        if (!channel) continue;
        auto& [sender, receiver] = channels[channel->first];
        End& mine = event(r, i).kind == "send" ? sender : receiver;
        End& others = event(r, i).kind == "send" ? receiver : sender;
        mine.rank = r;
        others.rank = channel->second;
        mine.positions.push_back(i);
      }
    }
    for (const auto& [channel, ends] : channels) {
      const auto& [sender, receiver] = ends;
      const size_t messages = std::max(sender.positions.size(), receiver.positions.size());
      for (size_t m = 0; m < messages; ++m) {
        const auto position = [&](const End& end) {
          return m < end.positions.size() ? end.positions[m] : size(end.rank);
        };
        const size_t from = position(sender);
        const size_t to = position(receiver);
        if (from < size(sender.rank) && to < size(receiver.rank) &&
            event(sender.rank, from).bytes == event(receiver.rank, to).bytes)
          continue;
        fail(fmt::format("message {} from rank {} to rank {} with tag {} does not arrive: {}, {}", m,
                         ranks_[sender.rank].rank, ranks_[receiver.rank].rank, std::get<3>(channel),
                         does(sender.rank, from), does(receiver.rank, to)));
      }
    }
  }

  // Lets all ranks make their calls as far as they get.
  void check_progress() const {
    std::vector<size_t> next(ranks_.size(), 0);
    std::map<Channel, int64_t> arrived;
    std::deque<size_t> can_try;
    for (size_t r = 0; r < ranks_.size(); ++r) can_try.push_back(r);
    while (!can_try.empty()) {
      const size_t r = can_try.front();
      can_try.pop_front();
      while (next[r] < size(r) && goes_on(r, next, arrived, can_try)) {
      }
    }
    std::vector<std::string> stuck;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if (next[r] < size(r)) stuck.push_back(does(r, next[r]));
    }
    constexpr size_t kMostTold = 4;
    if (stuck.empty()) return;
    const size_t count = stuck.size();
    stuck.resize(std::min(count, kMostTold));
    fail(fmt::format("{} ranks wait for each other for ever: {}", count, fmt::join(stuck, ", ")));
  }

  // Whether a rank's next call can be made now; then it and all that this call ends have gone on.
  bool goes_on(size_t r, std::vector<size_t>& next, std::map<Channel, int64_t>& arrived,
               std::deque<size_t>& can_try) const {
    const TrafficEvent& e = event(r, next[r]);
    if (is_message(e.kind)) {
      const auto channel = channel_of(r, next[r]);
      if (channel && e.kind == "send") {
        ++arrived[channel->first];
        can_try.push_back(channel->second);
      } else if (channel) {
        int64_t& waiting = arrived[channel->first];
        if (waiting == 0) return false;
        --waiting;
      }
      ++next[r];
      return true;
    }
    const size_t group = groups_of_[r][next[r]];
    const std::vector<size_t>& present = groups_[group].present;
    for (const size_t member : present) {
      if (next[member] >= size(member) || is_message(event(member, next[member]).kind) ||
          groups_of_[member][next[member]] != group)
        return false;
    }
    for (const size_t member : present) {
      ++next[member];
      if (member != r) can_try.push_back(member);
    }
    return true;
  }

  std::span<const RankEvents> ranks_;
  std::map<int, size_t> index_of_;              // by world rank
  std::vector<std::vector<size_t>> groups_of_;  // [rank][call]
  std::vector<KnownGroup> groups_;
  std::map<const GroupMembers*, size_t> known_;
  std::map<std::pair<std::string, std::vector<int>>, size_t> by_members_;
};

}  // namespace

void check_launch_order(std::span<const RankEvents> ranks) { Launches(ranks).check(); }

}  // namespace normformer
