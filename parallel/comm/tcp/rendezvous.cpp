#include <charconv>
#include <cstdlib>

#include "normformer/comm/tcp.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// A variable's text; an empty one counts as unset.
std::string text_of(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool is_set(const char* name) { return !text_of(name).empty(); }

int number_of(const char* name) {
  const std::string text = text_of(name);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw ConfigError(fmt::format("{} is \"{}\", not a whole number", name, text));
  }
  return value;
}

// Which variables say where this process stands.
struct Names {
  const char* rank;
  const char* size;
  const char* local_rank;
  const char* local_size;  // null where the launcher has none
};
constexpr Names kTorchNames{"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
constexpr Names kSlurmNames{"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", nullptr};

void require_both(const char* one, const char* other) {
  if (is_set(one) == is_set(other)) return;
  const bool first = is_set(one);
  throw ConfigError(fmt::format("{} is set, but {} is not: ranks started without mpirun need both",
                                first ? one : other, first ? other : one));
}

void check_below(const char* what, int value, const char* limit_name, int limit) {
  if (value < limit) return;
  throw ConfigError(fmt::format("{} is {}, but {} is {}", what, value, limit_name, limit));
}

Rendezvous standing_by(const Names& names) {
  require_both(names.rank, names.size);
  Rendezvous standing;
  standing.rank = number_of(names.rank);
  standing.size = number_of(names.size);
  check_below(names.rank, standing.rank, names.size, standing.size);
  if (is_set(names.local_rank)) standing.local_rank = number_of(names.local_rank);
  if (names.local_size != nullptr && is_set(names.local_size)) {
    standing.local_size = number_of(names.local_size);
    check_below(names.local_rank, standing.local_rank, names.local_size, standing.local_size);
    check_below(names.local_size, standing.local_size - 1, names.size, standing.size);
  }
  return standing;
}

std::string address_in_environment() {
  if (is_set("NORMFORMER_RENDEZVOUS")) {
    const std::string address = text_of("NORMFORMER_RENDEZVOUS");
    if (!address.starts_with("tcp://") && !address.starts_with("file:///")) {
      throw ConfigError(fmt::format(
          "NORMFORMER_RENDEZVOUS is \"{}\": write tcp://host:port or file:///shared/folder/name", address));
    }
    return address;
  }
  require_both("MASTER_ADDR", "MASTER_PORT");
  if (!is_set("MASTER_ADDR")) return "";
  const std::string host = text_of("MASTER_ADDR");
  const bool bare_ipv6 = host.find(':') != std::string::npos && host.front() != '[';
  return fmt::format("tcp://{}:{}", bare_ipv6 ? "[" + host + "]" : host, number_of("MASTER_PORT"));
}

}  // namespace

std::optional<Rendezvous> rendezvous_from_environment() {
  const bool torch = is_set(kTorchNames.rank) || is_set(kTorchNames.size);
  const bool slurm = is_set(kSlurmNames.rank);
  const std::string address = address_in_environment();
  if (!torch && address.empty()) return std::nullopt;
  if (!torch && !slurm) {
    throw ConfigError(
        fmt::format("the environment says that ranks meet at {}, but not which rank this is: set RANK and "
                    "WORLD_SIZE too, or unset NORMFORMER_RENDEZVOUS, MASTER_ADDR and MASTER_PORT",
                    address));
  }
  Rendezvous found = standing_by(torch ? kTorchNames : kSlurmNames);
  if (found.size > 1 && address.empty()) {
    throw ConfigError(fmt::format(
        "WORLD_SIZE is {}, but nothing says where ranks meet: set MASTER_ADDR and MASTER_PORT, or "
        "NORMFORMER_RENDEZVOUS",
        found.size));
  }
  found.address = address;
  found.job = text_of(is_set("NORMFORMER_JOB_ID") ? "NORMFORMER_JOB_ID" : "SLURM_JOB_ID");
  return found;
}

}  // namespace normformer
