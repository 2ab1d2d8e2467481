#pragma once

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "normformer/comm/group.h"

namespace normformer::testing {

/// One promise of Group, as a check that every rank of a world runs together. Reports through EXPECT_*, so
/// that no rank leaves a collective early.
struct ContractCase {
  std::string name;
  std::function<void(const Group& world)> check;
};

/// So that GoogleTest names a case by its name.
inline void PrintTo(const ContractCase& contract, std::ostream* out) { *out << contract.name; }

/// What every transport must do, at any number of ranks.
const std::vector<ContractCase>& comm_contract();

/// While it lives the contract's tensors are on GPUs. Made and destroyed while no check runs.
class ContractOnGpu {
 public:
  ContractOnGpu();
  ~ContractOnGpu();
  ContractOnGpu(const ContractOnGpu&) = delete;
  ContractOnGpu& operator=(const ContractOnGpu&) = delete;
};

/// Everything that a rank's accounts say.
struct Accounts {
  std::vector<TrafficRecord> records;
  std::vector<std::string> events;
  std::vector<std::string> costs;
  MemoryReport memory;
};

/// The accounts after a fixed sequence of calls of every kind, with tensors on `device`.
Accounts account(const Group& world, DeviceKind device);

/// EXPECTs that two accounts agree to the byte.
void expect_same(const Accounts& meta, const Accounts& real);

}  // namespace normformer::testing
