#include "faults.h"

#include <csignal>
#include <memory>
#include <string>

#include <fmt/format.h>
#include <unistd.h>

#include "block.h"
#include "memory.h"

namespace simt {

namespace {

// What would have handled the fault: a sanitizer, or nothing.
struct sigaction earlier;

// The program ends at this fault, so what may not be called from a handler is called all the same.
void explain(int, siginfo_t* info, void*) {
  sigaction(SIGSEGV, &earlier, nullptr);
  const std::string text = fmt::format(
      "simt: {}: access to {}{}{}\n", in_kernel() ? describe_running() : "not in a kernel", info->si_addr,
      describe_address_of_memory(info->si_addr), describe_address_of_block(info->si_addr));
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

bool install() {
  struct sigaction action {};
  action.sa_sigaction = &explain;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return sigaction(SIGSEGV, &action, &earlier) == 0;
}

/// A stack for the handler, which a fiber that ran out of its own needs; one for each host thread that has
/// none.
class SignalStack {
 public:
  SignalStack() {
    stack_t stack{};
    if (sigaltstack(nullptr, &stack) != 0 || (stack.ss_flags & SS_DISABLE) == 0) return;
    memory_ = std::make_unique<char[]>(kBytes);
    stack = {};
    stack.ss_sp = memory_.get();
    stack.ss_size = kBytes;
    sigaltstack(&stack, nullptr);
  }
  ~SignalStack() {
    if (memory_ == nullptr) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
  }
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  static constexpr size_t kBytes = size_t{64} << 10;
  std::unique_ptr<char[]> memory_;
};

}  // namespace

void explain_faults() {
  [[maybe_unused]] static const bool installed = install();
  thread_local const SignalStack stack;
}

}  // namespace simt
