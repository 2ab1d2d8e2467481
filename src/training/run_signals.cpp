#include "normformer/training/run_signals.h"

#include <atomic>
#include <csignal>

namespace normformer {

namespace {

volatile std::sig_atomic_t stop_requested = 0;
std::atomic<int64_t> saves_requested{0};  // any thread may take a signal
static_assert(std::atomic<int64_t>::is_always_lock_free);

extern "C" void request_stop(int signal) {
  // mpirun and a wrapper may both deliver SIGUSR1: it stays a request. A person's second Ctrl-C means now.
  if (stop_requested != 0 && signal != SIGUSR1) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  stop_requested = 1;
}

extern "C" void request_save(int) { ++saves_requested; }

}  // namespace

RunSignals::RunSignals(bool with_terminal_signals) : with_terminal_signals_(with_terminal_signals) {
  stop_requested = 0;
  saves_requested = 0;
  std::signal(SIGUSR1, request_stop);
  std::signal(SIGUSR2, request_save);
  if (!with_terminal_signals_) return;
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
}

RunSignals::~RunSignals() {
  std::signal(SIGUSR1, SIG_DFL);
  std::signal(SIGUSR2, SIG_IGN);
  if (!with_terminal_signals_) return;
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

bool RunSignals::requested_stop() const { return stop_requested != 0; }

int64_t RunSignals::save_requests() const { return saves_requested; }

}  // namespace normformer
