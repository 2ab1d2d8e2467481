#include "normformer/comm/ledger_file.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "normformer/core/error.h"
#include "normformer/core/unique_handle.h"
#include "normformer/tensor/trace.h"

#include "ledger_layout.h"

namespace normformer {

namespace {

using ledger_layout::CallSlot;
using ledger_layout::Fixed;
using ledger_layout::GroupSlot;

struct DescriptorTraits {
  using Handle = int;
  static int none() { return -1; }
  static void close(int descriptor) noexcept { ::close(descriptor); }
};

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Copies what fits and leaves a zero behind it.
template <size_t N>
void put_text(std::string_view text, char (&into)[N]) {
  into[text.copy(into, N - 1)] = 0;
}

// Each word is stored after the ones before it, so that a reader who finds a new word will find the stamp
// that came before them all, too. ThreadSanitizer does not know fences.
void store(CallSlot& slot, size_t word, uint64_t value) {
  slot.words[word].store(value, std::memory_order_release);
}

template <size_t Words>
void store_text(CallSlot& slot, size_t first, const std::array<char, 8 * Words>& text) {
  for (size_t w = 0; w < Words; ++w) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + 8 * w, 8);
    store(slot, first + w, word);
  }
}

}  // namespace

bool is_message(std::string_view kind) { return kind == "send" || kind == "receive"; }

std::string_view name_of(RunPhase phase) {
  switch (phase) {
    case RunPhase::starting:
      return "starting";
    case RunPhase::loading:
      return "loading";
    case RunPhase::training:
      return "training";
    case RunPhase::validating:
      return "validating";
    case RunPhase::saving:
      return "saving";
    case RunPhase::ending:
      return "ending";
  }
  return "?";
}

std::string ledger_file_name(int rank) { return fmt::format("rank-{:05}.ledger", rank); }

struct LedgerFile::Mapping {
  Mapping(const std::filesystem::path& path, size_t size_in_bytes) : size(size_in_bytes) {
    const UniqueHandle<DescriptorTraits> file(
        open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
    if (!file) throw IoError(fmt::format("cannot make {}: {}", path.string(), system_reason()));
    // A page without space on its disk would end the process where it is written first.
    errno = posix_fallocate(file.get(), 0, static_cast<off_t>(size));
    if (errno != 0) throw IoError(fmt::format("cannot write {}: {}", path.string(), system_reason()));
    void* const mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (mapped == MAP_FAILED)
      throw IoError(fmt::format("cannot map {} into memory: {}", path.string(), system_reason()));
    address = static_cast<std::byte*>(mapped);
    fixed = new (address) Fixed();
    members = new (address + sizeof(Fixed)) int32_t[(size - sizeof(Fixed)) / sizeof(int32_t)]();
  }
  ~Mapping() { munmap(address, size); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  size_t size;
  std::byte* address = nullptr;
  Fixed* fixed = nullptr;
  int32_t* members = nullptr;
};

LedgerFile::LedgerFile(const std::filesystem::path& path, int rank, int world_size) {
  std::filesystem::path unfinished = path;
  unfinished += ".new";
  mapping_ = std::make_unique<Mapping>(unfinished, ledger_layout::file_size(world_size));
  ledger_layout::Header& header = mapping_->fixed->header;
  header.magic = ledger_layout::kMagic;
  header.version = ledger_layout::kVersion;
  header.rank = rank;
  header.world_size = world_size;
  header.process = getpid();
  header.started_ns = now_ns();
  put_text(host_name(), header.host);
  std::error_code error;
  std::filesystem::rename(unfinished, path, error);
  if (error) throw IoError(fmt::format("cannot make {}: {}", path.string(), error.message()));
}

LedgerFile::~LedgerFile() = default;

void LedgerFile::begin_update(int64_t update) noexcept {
  mapping_->fixed->header.update.store(static_cast<uint64_t>(update), std::memory_order_release);
}

void LedgerFile::end_run() noexcept {
  mapping_->fixed->header.ended_ns.store(static_cast<uint64_t>(now_ns()), std::memory_order_release);
}

void LedgerFile::enter_phase(RunPhase phase) noexcept {
  mapping_->fixed->header.phase.store(static_cast<uint64_t>(phase), std::memory_order_release);
}

void LedgerFile::sign_of_life(int64_t still_ns) noexcept {
  ledger_layout::Header& header = mapping_->fixed->header;
  header.still_ns.store(static_cast<uint64_t>(still_ns), std::memory_order_release);
  header.alive_ns.store(static_cast<uint64_t>(now_ns()), std::memory_order_release);
}

std::span<const std::byte> LedgerFile::bytes() const { return {mapping_->address, mapping_->size}; }

uint32_t LedgerFile::number_of(const std::shared_ptr<const GroupMembers>& group) {
  for (const auto& [known, number] : known_groups_) {
    if (known == group) return number;
  }
  constexpr size_t kMostKnown = 4 * ledger_layout::kGroups;
  for (const auto& [known, number] : known_groups_) {
    if (known->name != group->name || known->world_ranks != group->world_ranks) continue;
    const uint32_t same = number;
    if (known_groups_.size() < kMostKnown) known_groups_.emplace_back(group, same);
    return same;
  }
  const uint32_t entered = enter_group(*group);
  if (known_groups_.size() < kMostKnown) known_groups_.emplace_back(group, entered);
  return entered;
}

uint32_t LedgerFile::enter_group(const GroupMembers& group) {
  Fixed& fixed = *mapping_->fixed;
  const size_t room = ledger_layout::room_for_members(fixed.header.world_size);
  const auto slot = std::find_if(std::begin(fixed.groups), std::end(fixed.groups), [](const GroupSlot& g) {
    return g.size.load(std::memory_order_relaxed) == 0;
  });
  if (slot == std::end(fixed.groups) || group.world_ranks.size() > room - used_members_)
    return ledger_layout::kNoGroup;
  std::copy(group.world_ranks.begin(), group.world_ranks.end(), mapping_->members + used_members_);
  slot->first_member = used_members_;
  put_text(group.name, slot->name);
  used_members_ += group.world_ranks.size();
  slot->size.store(group.world_ranks.size(), std::memory_order_release);
  return static_cast<uint32_t>(slot - std::begin(fixed.groups));
}

uint64_t LedgerFile::count(uint32_t group, const TrafficEvent& event) {
  if (group == ledger_layout::kNoGroup) return 0;
  const auto count_in = [](ledger_layout::Word& counter) {
    const uint64_t counted = counter.load(std::memory_order_relaxed) + 1;
    counter.store(counted, std::memory_order_release);
    return counted;
  };
  if (!is_message(event.kind)) return count_in(mapping_->fixed->groups[group].collectives);
  const uint64_t key = ledger_layout::channel_key(group, event.kind == "send", event.peer, event.tag);
  for (ledger_layout::ChannelSlot& channel : mapping_->fixed->channels) {
    const uint64_t known = channel.key.load(std::memory_order_relaxed);
    if (known == 0) channel.key.store(key, std::memory_order_release);
    if (known == 0 || known == key) return count_in(channel.messages);
  }
  return 0;
}

// One thread at a time: the mutex is held.
void LedgerFile::count_activity() noexcept {
  activity_.store(activity_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

uint64_t LedgerFile::issue(const TrafficEvent& event) {
  const std::lock_guard lock(mutex_);
  std::array<char, 8 * CallSlot::kPlaceWords> place{};
  name_innermost_span(place);
  std::array<char, 16> kind{};
  event.kind.copy(kind.data(), kind.size());
  const uint32_t group = number_of(event.group);
  const uint64_t ordinal = count(group, event);

  const uint64_t number = next_call_++;
  CallSlot& slot = mapping_->fixed->calls[number % ledger_layout::kCalls];
  slot.stamp.store(2 * number + 1, std::memory_order_relaxed);
  store_text<2>(slot, CallSlot::kKind, kind);
  store(slot, CallSlot::kGroup, group);
  store(slot, CallSlot::kPeerTag,
        (static_cast<uint64_t>(static_cast<uint32_t>(event.peer)) << 32) | static_cast<uint32_t>(event.tag));
  store(slot, CallSlot::kOrdinal, ordinal);
  store(slot, CallSlot::kBytes, static_cast<uint64_t>(event.bytes));
  store(slot, CallSlot::kIssued, static_cast<uint64_t>(now_ns()));
  store(slot, CallSlot::kDone, 0);
  store_text<CallSlot::kPlaceWords>(slot, CallSlot::kPlace, place);
  slot.stamp.store(2 * number + 2, std::memory_order_release);
  count_activity();
  return number;
}

void LedgerFile::complete(uint64_t call) noexcept {
  const std::lock_guard lock(mutex_);
  count_activity();
  CallSlot& slot = mapping_->fixed->calls[call % ledger_layout::kCalls];
  if (slot.stamp.load(std::memory_order_relaxed) != 2 * call + 2) return;
  slot.words[CallSlot::kDone].store(static_cast<uint64_t>(now_ns()), std::memory_order_release);
}

}  // namespace normformer
