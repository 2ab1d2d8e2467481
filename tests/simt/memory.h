#pragma once

#include <cstddef>
#include <string>

#include "simt/runtime_api.h"

namespace simt {

/// Whose memory an address is.
enum class Place { pageable, pinned, device };

/// A block whose end, rounded up to 16 bytes, touches a page that cannot be accessed, as does the page in
/// front. Blocks of the device's of up to 64 MiB have all bits set. Null where there is not enough.
void* allocate(size_t bytes, Place place);

/// Takes a block back, which cannot be accessed from then on. False where it is none of allocate(). Ends the
/// program where the bytes between its end and the guard were overwritten.
bool deallocate(void* block, Place place);

/// Where a range lies. `whole` says whether it lies within one block (always true of pageable memory).
struct Location {
  Place place = Place::pageable;
  bool whole = true;
};
Location locate(const void* begin, size_t bytes);

/// The device's memory in bytes.
size_t free_memory();
size_t total_memory();

/// ": behind the 1000 bytes at 0x7f..." and the like; empty for an address that no block guards.
std::string describe_address_of_memory(const void* address);

}  // namespace simt
