#include "normformer/training/replica_check.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <span>

#include <fmt/ranges.h>
#include <xxhash.h>

#include "normformer/training/agreement.h"

namespace normformer {

namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;

uint64_t hash_of(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

// The groups over which something is held alike.
enum Copies : size_t { over_replicas, over_tensor, over_embedding, over_replication, kCopies };

// A run of values that this rank shares with others.
struct Held {
  const Parameter* parameter;
  std::string_view what;
  Range range;  // of the rank's part
  Tensor values;
  std::array<bool, kCopies> copied = {};
  uint64_t hash = 0;

  // The same on every rank that holds the same values.
  std::string key() const {
    const Rectangle& part = parameter->spec.part;
    return fmt::format("{}|{}|{} {} {} {} {} {}", parameter->spec.name, what, part.rows.begin, part.rows.end,
                       part.columns.begin, part.columns.end, range.begin, range.end);
  }
};

std::string_view name_of(StateRole role) {
  switch (role) {
    case StateRole::master:
      return "master";
    case StateRole::moment1:
      return "moment1";
    case StateRole::moment2:
      return "moment2";
  }
  return "?";
}

// Everything of one rank, and the hashes of it.
class Holdings {
 public:
  explicit Holdings(Trainer& trainer)
      : trainer_(trainer),
        groups_{&mesh().replicas(), &mesh().tensor(), &mesh().embedding(), &mesh().replication()} {
    trainer_.model().store().await_values();
    list_weights();
    if (is_shared(over_replication)) list_state();
    hash_all();
  }

  const Mesh& mesh() const { return trainer_.model().mesh(); }
  const std::vector<Held>& all() const { return held_; }
  const Group& group(size_t copies) const { return *groups_[copies]; }
  bool is_shared(size_t copies) const { return groups_[copies]->defined() && groups_[copies]->size() > 1; }

  // Hashes of what is held alike over a group, in an order that all of it have.
  std::vector<uint64_t> hashes(size_t copies) const {
    std::vector<uint64_t> chosen;
    for (const Held& held : held_)
      if (held.copied[copies]) chosen.push_back(held.hash);
    return chosen;
  }

 private:
  void list_weights();
  void list_state();
  void hash_all();

  Trainer& trainer_;
  std::array<const Group*, kCopies> groups_;
  std::vector<Held> held_;
};

// Vectors that the tensor group splits are never whole on a rank: it has a head of each at least.
void Holdings::list_weights() {
  ParameterStore& store = trainer_.model().store();
  for (const Bucket& bucket : store.buckets()) {
    const bool is_whole = !store.splits_values(bucket);
    for (const Parameter& p : store.parameters()) {
      const Range run = intersect(is_whole ? bucket.flat : bucket.piece, p.flat_range());
      if (run.empty()) continue;
      const Tensor& values = is_whole ? bucket.values : bucket.value_piece;
      const int64_t begin = is_whole ? bucket.flat.begin : bucket.piece.begin;
      Held held{&p,
                "weights",
                {run.begin - p.offset, run.end - p.offset},
                values.flat(run.begin - begin, run.size())};
      held.copied[over_replicas] = is_whole && is_shared(over_replicas);
      held.copied[over_tensor] = is_whole && is_shared(over_tensor) && p.spec.part.is_whole();
      held.copied[over_embedding] = is_whole && is_shared(over_embedding) && p.spec.sum_over.embedding;
      held.copied[over_replication] = !is_whole && is_shared(over_replication);
      held_.push_back(std::move(held));
    }
  }
}

// Masters of the weights' own type are the weights.
void Holdings::list_state() {
  const DType weights = trainer_.model().store().dtype();
  for (const StatePiece& state : trainer_.optimizer().state()) {
    if (state.role == StateRole::master && state.piece.values.dtype() == weights) continue;
    Held held{state.piece.parameter, name_of(state.role), state.piece.range, state.piece.values};
    held.copied[over_replication] = true;
    held_.push_back(std::move(held));
  }
}

// Threads share blocks of a fixed size, so that a hash depends on the values alone.
void Holdings::hash_all() {
  struct Block {
    Tensor values;
    uint64_t hash = 0;
  };
  std::erase_if(held_, [](const Held& held) {
    return std::none_of(held.copied.begin(), held.copied.end(), [](bool copied) { return copied; });
  });
  std::vector<Block> blocks;
  for (const Held& held : held_) {
    const int64_t most = kBlockBytes / size_of(held.values.dtype());
    for (int64_t at = 0; at < held.values.numel(); at += most)
      blocks.push_back({held.values.flat(at, std::min(most, held.values.numel() - at))});
  }
  Context& context = trainer_.model().context();
  const auto hash_block = [](Block& block, const Tensor& host) {
    block.hash = hash_of(host.host_raw(), static_cast<size_t>(host.nbytes()));
  };
  if (context.is_cuda()) {
    for (Block& block : blocks) hash_block(block, on_host(context, block.values));
  } else {
    context.threads().parallel_for(static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
        hash_block(blocks[i], blocks[i].values);
    });
  }
  size_t next = 0;
  for (Held& held : held_) {
    std::vector<uint64_t> hashes;
    const int64_t most = kBlockBytes / size_of(held.values.dtype());
    for (int64_t at = 0; at < held.values.numel(); at += most) hashes.push_back(blocks[next++].hash);
    held.hash = hash_of(hashes.data(), hashes.size() * sizeof(uint64_t));
  }
}

// Names of the parameters whose weights on this rank are not its masters rounded.
std::set<std::string> find_not_rounded(Trainer& trainer) {
  ParameterStore& store = trainer.model().store();
  Context& context = store.context();
  std::set<std::string> names;
  for (const StatePiece& state : trainer.optimizer().state()) {
    const Tensor& master = state.piece.values;
    if (state.role != StateRole::master || master.dtype() == store.dtype()) continue;
    const Parameter& p = *state.piece.parameter;
    const int64_t at = p.offset + state.piece.range.begin;
    const auto bucket = std::find_if(store.buckets().begin(), store.buckets().end(),
                                     [&](const Bucket& b) { return at >= b.flat.begin && at < b.flat.end; });
    const Tensor rounded = context.empty({master.numel()}, store.dtype(), MemoryUse::workspace);
    copy(context, master, rounded);
    const Tensor expected = on_host(context, rounded);
    const Tensor weights =
        on_host(context, bucket->value_piece.flat(at - bucket->piece.begin, master.numel()));
    if (std::memcmp(expected.host_raw(), weights.host_raw(), static_cast<size_t>(weights.nbytes())) != 0)
      names.insert(p.spec.name);
  }
  return names;
}

// What a rank tells all others at first.
struct Digest {
  std::array<int32_t, kCopies> first;  // world rank of the group over which copies are held; -1 for none
  int64_t has_own_fault;
  std::array<uint64_t, kCopies> hash;  // of all that is held alike over it
};

template <class T>
std::string bytes_of(std::span<const T> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
}

template <class T>
std::vector<T> values_of(const std::string& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

std::vector<Digest> gather_digests(const Holdings& holdings, bool has_own_fault) {
  Digest mine{};
  mine.has_own_fault = has_own_fault ? 1 : 0;
  for (size_t c = 0; c < kCopies; ++c) {
    const std::vector<uint64_t> hashes = holdings.hashes(c);
    mine.first[c] = hashes.empty() ? -1 : holdings.group(c).world_ranks().front();
    mine.hash[c] = hash_of(hashes.data(), hashes.size() * sizeof(uint64_t));
  }
  std::vector<Digest> all;
  for (const std::string& text :
       holdings.mesh().world().all_gather_text(bytes_of(std::span<const Digest>(&mine, 1))))
    all.push_back(values_of<Digest>(text).front());
  return all;
}

// First ranks of the groups whose members' hashes differ.
std::array<std::set<int32_t>, kCopies> find_differing(const std::vector<Digest>& digests) {
  std::array<std::set<int32_t>, kCopies> differing;
  for (size_t c = 0; c < kCopies; ++c) {
    std::map<int32_t, uint64_t> seen;
    for (const Digest& digest : digests) {
      const auto known = seen.emplace(digest.first[c], digest.hash[c]).first;
      if (digest.first[c] >= 0 && known->second != digest.hash[c]) differing[c].insert(digest.first[c]);
    }
  }
  return differing;
}

// What of this rank's holdings differs somewhere in its groups. Collective over each of them that differs.
std::set<const Held*> find_differing_here(const Holdings& holdings,
                                          const std::array<std::set<int32_t>, kCopies>& differing) {
  std::set<const Held*> found;
  for (size_t c = 0; c < kCopies; ++c) {
    const std::vector<uint64_t> mine = holdings.hashes(c);
    if (mine.empty() || !differing[c].contains(holdings.group(c).world_ranks().front())) continue;
    const auto texts = holdings.group(c).all_gather_text(bytes_of(std::span<const uint64_t>(mine)));
    for (const std::string& text : texts) {
      const std::vector<uint64_t> theirs = values_of<uint64_t>(text);
      NF_CHECK(theirs.size() == mine.size(), "ranks of group {} compare {} and {} values",
               holdings.group(c).name(), mine.size(), theirs.size());
      size_t i = 0;
      for (const Held& held : holdings.all()) {
        if (held.copied[c] && theirs[i++] != held.hash) found.insert(&held);
      }
    }
  }
  return found;
}

using Copyholders = std::map<std::string, std::map<std::string, std::vector<int>>>;  // by key, by hash

// Who holds which copy of what differs. Collective over the world.
Copyholders gather_copyholders(const Holdings& holdings, const std::set<const Held*>& differing,
                               const std::set<std::string>& not_rounded) {
  std::string mine;
  for (const Held* held : differing) mine += fmt::format("{}\t{:016x}\n", held->key(), held->hash);
  for (const std::string& name : not_rounded)
    mine += fmt::format("{}|{}|\t\n", name, ReplicaFault::kNotRounded);
  Copyholders holders;
  const std::vector<std::string> texts = holdings.mesh().world().all_gather_text(mine);
  for (size_t rank = 0; rank < texts.size(); ++rank) {
    for (size_t at = 0; at < texts[rank].size();) {
      const size_t tab = texts[rank].find('\t', at);
      const size_t end = texts[rank].find('\n', tab);
      holders[texts[rank].substr(at, tab - at)][texts[rank].substr(tab + 1, end - tab - 1)].push_back(
          static_cast<int>(rank));
      at = end + 1;
    }
  }
  return holders;
}

ReplicaFault fault_of(const std::string& key, const std::map<std::string, std::vector<int>>& by_hash) {
  const size_t bar = key.find('|');
  ReplicaFault fault{key.substr(0, bar), key.substr(bar + 1, key.find('|', bar + 1) - bar - 1), {}, {}};
  size_t holders = 0;
  for (const auto& [hash, ranks] : by_hash) holders += ranks.size();
  for (const auto& [hash, ranks] : by_hash) {
    const bool is_majority = fault.what != ReplicaFault::kNotRounded && 2 * ranks.size() > holders;
    std::vector<int>& into = is_majority ? fault.others : fault.suspects;
    into.insert(into.end(), ranks.begin(), ranks.end());
  }
  std::sort(fault.suspects.begin(), fault.suspects.end());
  return fault;
}

}  // namespace

std::vector<ReplicaFault> compare_replicas(Trainer& trainer) {
  NF_CHECK(trainer.is_settled(), "replicas are compared while a step is not settled");
  Context& context = trainer.model().context();
  if (context.is_meta()) return {};
  const TraceScope scope(context, TraceKind::step, "compare replicas");
  const Holdings holdings(trainer);
  const std::set<std::string> not_rounded = find_not_rounded(trainer);
  const std::vector<Digest> digests = gather_digests(holdings, !not_rounded.empty());
  const auto differing = find_differing(digests);
  const bool all_agree =
      std::all_of(differing.begin(), differing.end(), [](const auto& groups) { return groups.empty(); }) &&
      std::none_of(digests.begin(), digests.end(), [](const Digest& d) { return d.has_own_fault != 0; });
  if (all_agree) return {};
  std::vector<ReplicaFault> faults;
  for (const auto& [key, by_hash] :
       gather_copyholders(holdings, find_differing_here(holdings, differing), not_rounded))
    faults.push_back(fault_of(key, by_hash));
  return faults;
}

namespace {

std::string names_of(const std::vector<int>& ranks, const std::vector<std::string>& hosts) {
  std::vector<std::string> names;
  for (const int rank : ranks)
    names.push_back(fmt::format("{} ({})", rank, hosts[static_cast<size_t>(rank)]));
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(names, ", "));
}

std::string describe(const ReplicaFault& fault, const std::vector<std::string>& hosts) {
  const std::string suspects = names_of(fault.suspects, hosts);
  if (fault.what == ReplicaFault::kNotRounded) {
    return fmt::format("on {} the weights of {} are not the rounded master weights", suspects,
                       fault.parameter);
  }
  if (fault.others.empty())
    return fmt::format("{} hold different {} of {}", suspects, fault.what, fault.parameter);
  return fmt::format("{} of {} on {} {} not those of {}", fault.what, fault.parameter, suspects,
                     fault.what == "weights" ? "are" : "is", names_of(fault.others, hosts));
}

constexpr size_t kMostNamed = 5;

}  // namespace

std::string describe(const std::vector<ReplicaFault>& faults, const std::vector<std::string>& hosts) {
  std::vector<std::string> texts;
  for (size_t i = 0; i < std::min(kMostNamed, faults.size()); ++i)
    texts.push_back(describe(faults[i], hosts));
  if (faults.size() > kMostNamed) texts.push_back(fmt::format("{} more", faults.size() - kMostNamed));
  return fmt::format("{}", fmt::join(texts, "; "));
}

void require_equal_replicas(Trainer& trainer) {
  const std::vector<ReplicaFault> faults = compare_replicas(trainer);
  if (faults.empty()) return;
  const auto hosts = trainer.model().mesh().world().all_gather_text(host_name());
  throw AgreedError(
      ExitCode::corrupt,
      fmt::format("ranks do not hold the same model after update {}: {}; memory, a processor or "
                  "a network is at fault: --resume goes on from the newest checkpoint",
                  trainer.counters().updates, describe(faults, hosts)));
}

}  // namespace normformer
