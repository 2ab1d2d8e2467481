#pragma once

#include <functional>
#include <string>
#include <vector>

#include "normformer/comm/group.h"

namespace normformer {

/// "" where body returns, else what the exception that it threw says.
std::string failure_of(const std::function<void()>& body);

/// The first of the ranks' failures that is not "", with its rank and how many more there are; "" where there
/// is none.
std::string first_failure(const std::vector<std::string>& failures);

/// Runs `body` on rank 0 only; its failure, the same on every rank, "" where it returned.
/// Collective over `world`.
std::string root_failure(const Group& world, const std::function<void()>& body);

}  // namespace normformer
