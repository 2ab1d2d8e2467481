#include <mutex>
#include <set>
#include <string>

#include "nvtx3/nvToolsExt.h"
#include "simt/control.h"

namespace {

std::mutex mutex;
std::set<std::string>& names() {
  static std::set<std::string> all;
  return all;
}
thread_local int depth = 0;

}  // namespace

int nvtxRangePushA(const char* name) {
  const std::lock_guard lock(mutex);
  names().insert(name);
  return depth++;
}

int nvtxRangePop() {
  constexpr int kNoRange = -2;
  return depth == 0 ? kNoRange : --depth;
}

namespace simt {

std::set<std::string> range_names() {
  const std::lock_guard lock(mutex);
  return names();
}

int open_ranges() { return depth; }

}  // namespace simt
