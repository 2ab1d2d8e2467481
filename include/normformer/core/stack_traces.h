#pragma once

#include <string>
#include <string_view>

namespace normformer {

/// Lets stack_traces work: takes a real-time signal (SIGRTMIN + 5) for it, and loads now what a signal's
/// handler may not. Does nothing the second time. LogicError where the system refuses.
void prepare_stack_traces();

/// What every thread of this process is doing, for people: its id, name, state, and the functions that it is
/// in, innermost first, each with its place in its file ("normformer+0x1234", for addr2line -Cfie). Threads
/// in the same functions are told once. The calling thread, and threads named `left_out`, are not told. A
/// thread that does not answer within a fifth of a second is told by its state alone. The threads go on; a
/// system call that they were in may return early, as after any signal. To be called from one thread at a
/// time, after prepare_stack_traces.
std::string stack_traces(std::string_view left_out = {});

}  // namespace normformer
