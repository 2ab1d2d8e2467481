#include "normformer/training/stop_signal.h"

#include <csignal>

namespace normformer {

namespace {

volatile std::sig_atomic_t stop_requested = 0;

extern "C" void request_stop(int signal) {
  // mpirun and a wrapper may both deliver SIGUSR1: it stays a request. A person's second Ctrl-C means now.
  if (stop_requested != 0 && signal != SIGUSR1) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  stop_requested = 1;
}

}  // namespace

StopSignal::StopSignal(bool with_terminal_signals) : with_terminal_signals_(with_terminal_signals) {
  stop_requested = 0;
  std::signal(SIGUSR1, request_stop);
  if (!with_terminal_signals_) return;
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
}

StopSignal::~StopSignal() {
  std::signal(SIGUSR1, SIG_DFL);
  if (!with_terminal_signals_) return;
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

bool StopSignal::requested() const { return stop_requested != 0; }

}  // namespace normformer
