#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace normformer::ledger_layout {

// The file's bytes, version 2: a header, kGroups groups, kChannels channels, kCalls calls, then the groups'
// members as int32. See docs/ledger.md.

using Word = std::atomic<uint64_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

constexpr uint64_t kMagic = 0x52454744454c464e;  // the characters NFLEDGER on a little-endian machine
constexpr uint32_t kVersion = 2;
constexpr size_t kGroups = 32;
constexpr size_t kChannels = 128;
constexpr size_t kCalls = 256;
constexpr uint32_t kNoGroup = 0xffffffffu;

// What comes before `update` is written before the file has its name.
struct Header {
  uint64_t magic;
  uint32_t version;
  int32_t rank;
  int32_t world_size;
  uint32_t unused;
  int64_t process;
  int64_t started_ns;
  char host[200];
  Word update;
  Word ended_ns;
  Word alive_ns;
  Word still_ns;
  Word phase;  // a RunPhase
  Word unused_word;
};
static_assert(sizeof(Header) == 288);

struct GroupSlot {
  Word size;  // 0: unused. Written last, so that what else is here is whole.
  Word collectives;
  uint64_t first_member;
  char name[40];
};
static_assert(sizeof(GroupSlot) == 64);

// Messages of one direction between this rank and a peer of a group, with one tag.
struct ChannelSlot {
  Word key;  // channel_key; 0: unused
  Word messages;
};
static_assert(sizeof(ChannelSlot) == 16);

constexpr uint64_t channel_key(uint32_t group, bool sends, int peer, int tag) {
  const uint64_t direction = sends ? 1 : 2;
  return (direction << 62) | (static_cast<uint64_t>(group & 0xff) << 54) |
         (static_cast<uint64_t>(static_cast<uint32_t>(peer)) << 16) | (static_cast<uint32_t>(tag) & 0xffff);
}

// `stamp` of call number n: 2n + 1 while it is being entered, 2n + 2 then; 0 before the slot's first.
struct CallSlot {
  static constexpr size_t kPlaceWords = 7;
  enum : size_t { kKind = 0, kGroup = 2, kPeerTag, kOrdinal, kBytes, kIssued, kDone, kPlace, kWords = 15 };

  Word stamp;
  Word words[kWords];
};
static_assert(sizeof(CallSlot) == 128 && CallSlot::kPlace + CallSlot::kPlaceWords == CallSlot::kWords);

struct Fixed {
  Header header;
  GroupSlot groups[kGroups];
  ChannelSlot channels[kChannels];
  CallSlot calls[kCalls];
};

// Room for the mesh's groups: each of its axes divides the world, and others hold fewer ranks than the world.
constexpr size_t room_for_members(int world_size) { return 8 * static_cast<size_t>(world_size) + 256; }

constexpr size_t file_size(int world_size) {
  return sizeof(Fixed) + room_for_members(world_size) * sizeof(int32_t);
}

}  // namespace normformer::ledger_layout
