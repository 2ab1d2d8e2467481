#pragma once

#include <functional>
#include <string>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"

namespace normformer {

/// A failure that every rank knows of: one rank prints it, all leave in good order.
class AgreedError : public Error {
 public:
  using Error::Error;
};

/// Runs `body`, which must not communicate, on every rank. Where it throws an Error on any of them, throws on
/// all of them an AgreedError with each distinct message once, and the first failing rank's exit code. Other
/// exceptions pass through. Collective over `world`.
void run_agreed(const Group& world, const std::function<void()>& body);

/// Throws an AgreedError (ConfigError's exit code) where `value`, of lines, is not the same on every rank; it
/// names `what`, the first rank that has another value than rank 0, both hosts, and the first line that
/// differs. Collective over `world`.
void require_same(const Group& world, const std::string& what, const std::string& value);

}  // namespace normformer
