#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "normformer/comm/group.h"

namespace normformer {

/// Whether a call of this kind (as in TrafficRecord) is between two ranks, and no collective.
bool is_message(std::string_view kind);

/// "rank-00003.ledger"
std::string ledger_file_name(int rank);

/// What a run is at.
enum class RunPhase { starting, loading, training, validating, saving, ending };

/// "starting", "loading", ...
std::string_view name_of(RunPhase phase);

/// What one rank is doing, for others to read while it runs and after it was stopped or killed: its last 256
/// calls, in a file mapped into memory (docs/ledger.md has its layout). Attached to a TrafficLedger. Entering
/// a call makes no system call. Safe from several threads.
class LedgerFile {
 public:
  /// Makes the file of this process, in place of an earlier one; its folder must exist. IoError where the
  /// system refuses it or its disk is full.
  LedgerFile(const std::filesystem::path& path, int rank, int world_size);
  ~LedgerFile();
  LedgerFile(const LedgerFile&) = delete;
  LedgerFile& operator=(const LedgerFile&) = delete;

  /// Which update the rank is computing now, the first being 1.
  void begin_update(int64_t update) noexcept;

  /// The run has ended in good order.
  void end_run() noexcept;

  /// What the rank is at now.
  void enter_phase(RunPhase phase) noexcept;

  /// The rank's process is there now, and has made no progress for `still_ns`: to be called again and again.
  /// A process that is stopped or cut off from the file's disk no longer does.
  void sign_of_life(int64_t still_ns) noexcept;

  /// Calls issued and calls done so far, in one number that grows with each. Touches no page of the file.
  uint64_t activity() const noexcept { return activity_.load(std::memory_order_relaxed); }

  /// Enters a call as issued, with the calling thread's place in the model (name_innermost_span). Returns its
  /// number.
  uint64_t issue(const TrafficEvent& event);

  /// Marks a call of issue() as done, if it is still among the last.
  void complete(uint64_t call) noexcept;

  /// The file's bytes as they are now; they live as long as this object.
  std::span<const std::byte> bytes() const;

 private:
  struct Mapping;

  uint32_t number_of(const std::shared_ptr<const GroupMembers>& group);
  uint32_t enter_group(const GroupMembers& group);
  uint64_t count(uint32_t group, const TrafficEvent& event);
  void count_activity() noexcept;

  std::unique_ptr<Mapping> mapping_;
  std::mutex mutex_;
  uint64_t next_call_ = 0;
  std::atomic<uint64_t> activity_{0};
  std::vector<std::pair<std::shared_ptr<const GroupMembers>, uint32_t>> known_groups_;
  size_t used_members_ = 0;
};

/// A call as a ledger's file has it.
struct LedgerCall {
  int64_t number = 0;   ///< of all calls of the rank, from 0
  std::string kind;     ///< as in TrafficRecord
  int group = -1;       ///< index in RankLedger::groups; -1 where the file had no room for it
  int64_t ordinal = 0;  ///< the how-manieth collective of its group, or message of its channel, from 1; 0
                        ///< where the file had no room to count it
  int64_t bytes = 0;
  int peer = -1;  ///< as in TrafficEvent
  int tag = 0;
  std::string place;      ///< "decoder.layers.3.self_attn forward", cut to 56 characters
  int64_t issued_ns = 0;  ///< nanoseconds since 1970 of the writer's clock
  int64_t done_ns = 0;    ///< 0: not done

  bool is_done() const { return done_ns != 0; }
};

/// A group as a ledger's file has it.
struct LedgerGroup {
  GroupMembers members;     ///< its name cut to 39 characters
  int64_t collectives = 0;  ///< that the rank has issued
};

/// Messages that a rank has begun to send to one peer of a group with one tag.
struct LedgerChannel {
  int group = 0;  ///< index in RankLedger::groups
  int peer = 0;   ///< its rank in the group
  int tag = 0;
  int64_t sent = 0;
};

/// What a ledger's file says of its rank.
struct RankLedger {
  int rank = 0;
  int world_size = 1;
  std::string host;
  int64_t process = 0;
  int64_t started_ns = 0;
  int64_t ended_ns = 0;  ///< 0 where the run has not ended in good order
  int64_t update = 0;    ///< that it computes; 0 before the first
  RunPhase phase = RunPhase::starting;
  int64_t alive_ns = 0;  ///< the last sign that its process was there; 0 where there never was one
  int64_t still_ns = 0;  ///< that it had made no progress, then
  std::vector<LedgerGroup> groups;
  std::vector<LedgerChannel> channels;
  std::vector<LedgerCall> calls;  ///< oldest first
};

/// Reads a file's bytes, which its rank may be writing: each call is as it was at some moment. A call that is
/// being entered is left out. The bytes begin at a multiple of 8. DataError, naming the file `name`, for
/// anything that no LedgerFile writes.
RankLedger parse_ledger(std::span<const std::byte> bytes, const std::string& name);

/// As parse_ledger, from a file. IoError where it cannot be read.
RankLedger read_ledger(const std::filesystem::path& path);

/// The files of a folder, by rank; other files are ignored. DataError where there is none, where they are not
/// of one run, or as parse_ledger.
std::vector<RankLedger> read_ledgers(const std::filesystem::path& folder);

/// A call that is not done because of others.
struct LedgerWait {
  LedgerGroup group;
  LedgerCall call;              ///< of the first of `waiting`
  std::vector<int> waiting;     ///< world ranks that have issued it and are not done
  std::vector<int> not_issued;  ///< world ranks that have not: of a collective's group, or a message's
                                ///< sender; of a message to an absent rank, which may wait, none
};

/// What a run was waiting for when its ledgers were read.
struct LedgerDiagnosis {
  std::vector<LedgerWait> waits;

  /// Whom others wait for and who wait for nobody: they compute, are slow, stopped or gone. Ranks without a
  /// ledger are among them, and those that were known not to run. Sorted.
  std::vector<int> missing;
};

/// Compares what every rank has issued. A collective is the same on two ranks where its group and its ordinal
/// are; a message where its channel and its ordinal are. Ranks of `absent` are known not to run: whatever
/// their ledgers say, they wait for nobody, and who is in a call with them waits for them.
LedgerDiagnosis diagnose(std::span<const RankLedger> ledgers, std::span<const int> absent = {});

}  // namespace normformer
