#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "normformer/comm/ledger_file.h"
#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"

#include "ledger_layout.h"

namespace normformer {

namespace {

using ledger_layout::CallSlot;
using ledger_layout::Fixed;
using ledger_layout::GroupSlot;

// What cannot be shown on a terminal becomes a question mark: the bytes may be anybody's.
std::string printable(const char* text, size_t most) {
  std::string out(text, strnlen(text, most));
  std::replace_if(
      out.begin(), out.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return out;
}

// A ledger's bytes as someone may be writing them.
class Reader {
 public:
  Reader(std::span<const std::byte> bytes, const std::string& name) : bytes_(bytes), name_(name) {}

  RankLedger read() {
    check_frame();
    const ledger_layout::Header& header = fixed().header;
    RankLedger ledger{.rank = header.rank,
                      .world_size = header.world_size,
                      .host = printable(header.host, sizeof(header.host)),
                      .process = header.process,
                      .started_ns = header.started_ns,
                      .ended_ns = load(header.ended_ns),
                      .update = load(header.update),
                      .phase = static_cast<RunPhase>(load(header.phase)),
                      .alive_ns = load(header.alive_ns),
                      .still_ns = load(header.still_ns),
                      .groups = {},
                      .channels = {},
                      .calls = {}};
    // Groups and channels after the calls, which know no others then.
    for (size_t i = 0; i < ledger_layout::kCalls; ++i) {
      if (auto call = read_call(i)) ledger.calls.push_back(std::move(*call));
    }
    read_groups(ledger);
    read_channels(ledger);
    for (const LedgerCall& call : ledger.calls) check_call(ledger, call);
    keep_last_calls(ledger.calls);
    return ledger;
  }

 private:
  const Fixed& fixed() const { return *reinterpret_cast<const Fixed*>(bytes_.data()); }

  static int64_t load(const ledger_layout::Word& word) {
    return static_cast<int64_t>(word.load(std::memory_order_acquire));
  }

  void check(bool condition, const std::string& why) const {
    if (!condition) throw DataError(fmt::format("{} is no ledger of a rank: {}", name_, why));
  }
  void check_part(bool condition, const std::string& what) const {
    if (!condition) throw DataError(fmt::format("{} is damaged: {}", name_, what));
  }

  void check_frame() const {
    check(bytes_.size() >= sizeof(Fixed), fmt::format("it has {} bytes, and the smallest has {}",
                                                      bytes_.size(), ledger_layout::file_size(1)));
    const ledger_layout::Header& header = fixed().header;
    check(header.magic == ledger_layout::kMagic, "it does not begin with NFLEDGER");
    check(header.version == ledger_layout::kVersion,
          fmt::format("its version is {}, and this program reads version {}", header.version,
                      ledger_layout::kVersion));
    check_part(header.world_size > 0 && header.rank >= 0 && header.rank < header.world_size,
               fmt::format("rank {} of {}", header.rank, header.world_size));
    check_part(bytes_.size() == ledger_layout::file_size(header.world_size),
               fmt::format("it has {} bytes where a rank of {} has {}", bytes_.size(), header.world_size,
                           ledger_layout::file_size(header.world_size)));
    check_part(load(header.update) >= 0, fmt::format("update {}", load(header.update)));
    check_part(load(header.phase) >= 0 && load(header.phase) <= static_cast<int64_t>(RunPhase::ending),
               fmt::format("phase {}", load(header.phase)));
    check_part(load(header.alive_ns) >= 0 && load(header.still_ns) >= 0, "its signs of life");
  }

  // The words between two equal stamps; none where the slot is unused or all the time being written.
  std::optional<LedgerCall> read_call(size_t index) const {
    const CallSlot& slot = fixed().calls[index];
    constexpr int kMostTries = 1000;
    for (int tries = 0; tries < kMostTries; ++tries) {
      const uint64_t stamp = slot.stamp.load(std::memory_order_acquire);
      if (stamp == 0) return std::nullopt;
      if (stamp % 2 != 0) continue;
      std::array<uint64_t, CallSlot::kWords> words;
      for (size_t w = 0; w < words.size(); ++w) words[w] = slot.words[w].load(std::memory_order_acquire);
      if (slot.stamp.load(std::memory_order_acquire) != stamp) continue;
      const uint64_t number = stamp / 2 - 1;
      check_part(number % ledger_layout::kCalls == index,
                 fmt::format("call {} stands in place {}", number, index));
      return call_of(number, words);
    }
    return std::nullopt;
  }

  static LedgerCall call_of(uint64_t number, const std::array<uint64_t, CallSlot::kWords>& words) {
    const auto text = [&](size_t first, size_t count) {
      return printable(reinterpret_cast<const char*>(&words[first]), 8 * count);
    };
    return {.number = static_cast<int64_t>(number),
            .kind = text(CallSlot::kKind, 2),
            .group = static_cast<int>(static_cast<uint32_t>(words[CallSlot::kGroup])),
            .ordinal = static_cast<int64_t>(words[CallSlot::kOrdinal]),
            .bytes = static_cast<int64_t>(words[CallSlot::kBytes]),
            .peer = static_cast<int>(static_cast<uint32_t>(words[CallSlot::kPeerTag] >> 32)),
            .tag = static_cast<int>(static_cast<uint32_t>(words[CallSlot::kPeerTag])),
            .place = text(CallSlot::kPlace, CallSlot::kPlaceWords),
            .issued_ns = static_cast<int64_t>(words[CallSlot::kIssued]),
            .done_ns = static_cast<int64_t>(words[CallSlot::kDone])};
  }

  void read_groups(RankLedger& ledger) const {
    const auto* members = reinterpret_cast<const int32_t*>(bytes_.data() + sizeof(Fixed));
    const uint64_t room = ledger_layout::room_for_members(ledger.world_size);
    for (const GroupSlot& slot : fixed().groups) {
      const uint64_t size = slot.size.load(std::memory_order_acquire);
      if (size == 0) break;
      LedgerGroup group{{printable(slot.name, sizeof(slot.name)), {}}, load(slot.collectives)};
      check_part(size <= room && slot.first_member <= room - size && group.collectives >= 0,
                 fmt::format("group {}", group.members.name));
      const int32_t* first = members + slot.first_member;
      group.members.world_ranks.assign(first, first + size);
      for (const int member : group.members.world_ranks)
        check_part(member >= 0 && member < ledger.world_size,
                   fmt::format("rank {} in group {}", member, group.members.name));
      ledger.groups.push_back(std::move(group));
    }
  }

  void read_channels(RankLedger& ledger) const {
    for (const ledger_layout::ChannelSlot& slot : fixed().channels) {
      const uint64_t key = slot.key.load(std::memory_order_acquire);
      if (key == 0) break;
      if (key >> 62 != 1) continue;
      ledger.channels.push_back({.group = static_cast<int>(key >> 54 & 0xff),
                                 .peer = static_cast<int>(static_cast<uint32_t>(key >> 16)),
                                 .tag = static_cast<int>(key & 0xffff),
                                 .sent = load(slot.messages)});
      const LedgerChannel& read = ledger.channels.back();
      check_part(has_peer(ledger, read.group, read.peer) && read.sent >= 0,
                 fmt::format("the messages to rank {} of group {}", read.peer, read.group));
    }
  }

  static bool has_peer(const RankLedger& ledger, int group, int peer) {
    const auto g = static_cast<size_t>(group);
    return group >= 0 && g < ledger.groups.size() && peer >= 0 &&
           static_cast<size_t>(peer) < ledger.groups[g].members.world_ranks.size();
  }

  void check_call(const RankLedger& ledger, const LedgerCall& call) const {
    bool sound = call.bytes >= 0 && call.ordinal >= 0 && call.issued_ns >= 0 && call.done_ns >= 0;
    if (call.group != -1) {
      const bool is_collective = !is_message(call.kind);
      sound = sound && has_peer(ledger, call.group, is_collective ? std::max(0, call.peer) : call.peer) &&
              (!is_collective || call.ordinal <= ledger.groups[static_cast<size_t>(call.group)].collectives);
    }
    check_part(sound, fmt::format("call {}", call.number));
  }

  // What was overwritten while the calls were read may have left older ones than the ring holds.
  static void keep_last_calls(std::vector<LedgerCall>& calls) {
    std::sort(calls.begin(), calls.end(),
              [](const LedgerCall& a, const LedgerCall& b) { return a.number < b.number; });
    std::erase_if(calls, [newest = calls.empty() ? 0 : calls.back().number](const LedgerCall& call) {
      return call.number <= newest - static_cast<int64_t>(ledger_layout::kCalls);
    });
  }

  std::span<const std::byte> bytes_;
  const std::string& name_;
};

bool same_group(const GroupMembers& a, const GroupMembers& b) {
  return a.name == b.name && a.world_ranks == b.world_ranks;
}

// The number of collectives that a rank has issued in a group; 0 where it knows no such group.
int64_t issued_in(const RankLedger& ledger, const GroupMembers& group) {
  for (const LedgerGroup& known : ledger.groups) {
    if (same_group(known.members, group)) return known.collectives;
  }
  return 0;
}

// The number of messages that a rank has begun to send to rank `to` of a group.
int64_t sent_in(const RankLedger& ledger, const GroupMembers& group, int to, int tag) {
  for (const LedgerChannel& known : ledger.channels) {
    const GroupMembers& its = ledger.groups[static_cast<size_t>(known.group)].members;
    if (known.peer == to && known.tag == tag && same_group(its, group)) return known.sent;
  }
  return 0;
}

using LedgersByRank = std::map<int, const RankLedger*>;

// Whom of the group a call of `rank` that is not done waits for.
std::vector<int> not_issued_by(const LedgersByRank& ledgers, int rank, const LedgerGroup& group,
                               const LedgerCall& call) {
  const std::vector<int>& members = group.members.world_ranks;
  const bool receives = call.kind == "receive";
  const auto me = static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin());
  std::vector<int> missing;
  for (size_t m = 0; m < members.size(); ++m) {
    if (receives && static_cast<int>(m) != call.peer) continue;
    const auto found = ledgers.find(members[m]);
    const auto issued = [&](const RankLedger& theirs) {
      return receives ? sent_in(theirs, group.members, me, call.tag) : issued_in(theirs, group.members);
    };
    if (found == ledgers.end() || call.ordinal == 0 || issued(*found->second) < call.ordinal)
      missing.push_back(members[m]);
  }
  return missing;
}

// Whether a call that is not done is with one of these ranks.
bool is_with(const LedgerGroup& group, const LedgerCall& call, std::span<const int> ranks) {
  const std::vector<int>& members = group.members.world_ranks;
  const auto is_one = [&](int rank) { return std::find(ranks.begin(), ranks.end(), rank) != ranks.end(); };
  if (is_message(call.kind)) return is_one(members[static_cast<size_t>(call.peer)]);
  return std::any_of(members.begin(), members.end(), is_one);
}

bool same_call(const LedgerWait& wait, const LedgerGroup& group, const LedgerCall& call) {
  return !is_message(call.kind) && wait.call.kind == call.kind && wait.call.ordinal == call.ordinal &&
         same_group(wait.group.members, group.members);
}

}  // namespace

RankLedger parse_ledger(std::span<const std::byte> bytes, const std::string& name) {
  NF_CHECK(reinterpret_cast<uintptr_t>(bytes.data()) % alignof(Fixed) == 0,
           "a ledger's bytes are not aligned");
  return Reader(bytes, name).read();
}

RankLedger read_ledger(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_ledger(file.bytes(), path.string());
}

std::vector<RankLedger> read_ledgers(const std::filesystem::path& folder) {
  std::error_code error;
  std::vector<RankLedger> ledgers;
  for (std::filesystem::directory_iterator file(folder, error), end; !error && file != end;
       file.increment(error)) {
    if (file->path().extension() != ".ledger") continue;
    ledgers.push_back(read_ledger(file->path()));
    const RankLedger& read = ledgers.back();
    if (file->path().filename() != ledger_file_name(read.rank))
      throw DataError(fmt::format("{} is the ledger of rank {}", file->path().string(), read.rank));
    if (read.world_size != ledgers.front().world_size)
      throw DataError(fmt::format("{} is of a run of {} ranks, and others in this folder of one of {}",
                                  file->path().string(), read.world_size, ledgers.front().world_size));
  }
  if (error) throw DataError(fmt::format("cannot read {}: {}", folder.string(), error.message()));
  if (ledgers.empty()) throw DataError(fmt::format("{} holds no ledger of a rank", folder.string()));
  std::sort(ledgers.begin(), ledgers.end(),
            [](const RankLedger& a, const RankLedger& b) { return a.rank < b.rank; });
  return ledgers;
}

LedgerDiagnosis diagnose(std::span<const RankLedger> ledgers, std::span<const int> absent) {
  LedgersByRank by_rank;
  for (const RankLedger& ledger : ledgers) by_rank[ledger.rank] = &ledger;
  LedgerDiagnosis diagnosis;
  std::set<int> waiting;
  std::set<int> waited_for(absent.begin(), absent.end());
  for (const RankLedger& ledger : ledgers) {
    for (const LedgerCall& call : ledger.calls) {
      if (call.is_done() || call.group < 0) continue;
      const LedgerGroup& group = ledger.groups[static_cast<size_t>(call.group)];
      const bool sends = call.kind == "send";
      // A message counts as sent once its sender asks, which may be long after it was.
      if (sends && !is_with(group, call, absent)) continue;
      const std::vector<int> missing =
          sends ? std::vector<int>() : not_issued_by(by_rank, ledger.rank, group, call);
      waited_for.insert(missing.begin(), missing.end());
      if (!missing.empty() || is_with(group, call, absent)) waiting.insert(ledger.rank);
      const auto known = std::find_if(diagnosis.waits.begin(), diagnosis.waits.end(),
                                      [&](const LedgerWait& wait) { return same_call(wait, group, call); });
      if (known == diagnosis.waits.end())
        diagnosis.waits.push_back({group, call, {ledger.rank}, missing});
      else
        known->waiting.push_back(ledger.rank);
    }
  }
  for (const int rank : absent) waiting.erase(rank);
  std::set_difference(waited_for.begin(), waited_for.end(), waiting.begin(), waiting.end(),
                      std::back_inserter(diagnosis.missing));
  return diagnosis;
}

}  // namespace normformer
