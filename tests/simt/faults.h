#pragma once

namespace simt {

/// Has a fault on this host thread say, before it ends the program, which thread of which kernel accessed
/// what. What handled faults before (a sanitizer's handler) does so afterwards.
void explain_faults();

}  // namespace simt
