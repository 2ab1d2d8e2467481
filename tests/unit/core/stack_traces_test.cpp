#include "normformer/core/stack_traces.h"

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <unistd.h>

namespace normformer {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

// Threads that are in the same function until this ends.
class Sleepers {
 public:
  Sleepers(int count, void (*function)(Sleepers&)) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this, function] { function(*this); });
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return there_ == count; });
  }
  ~Sleepers() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Sleepers(const Sleepers&) = delete;
  Sleepers& operator=(const Sleepers&) = delete;

  void sleep(const char* name) {
    pthread_setname_np(pthread_self(), name);
    std::unique_lock lock(mutex_);
    ++there_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return ended_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;  // ThreadSanitizer lets a signal through there
  int there_ = 0;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

// The call must not be its last act, or the function would not be on the stack.
__attribute__((noinline)) void function_to_be_found(Sleepers& sleepers) {
  sleepers.sleep("sleeper");
  asm volatile("");
}

void deaf_function(Sleepers& sleepers) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  sleepers.sleep("deaf");
  asm volatile("");
}

TEST(StackTraces, NameFunctionsThatAreLocalToAFile) {
  prepare_stack_traces();
  const Sleepers sleepers(1, function_to_be_found);
  EXPECT_THAT(
      stack_traces(),
      ContainsRegex(
          "thread [0-9]+ \\(sleeper\\), [a-z]+\n(  #.*\n)+"
          "  #[0-9]+ +normformer::\\(anonymous namespace\\)::function_to_be_found\\(.*\\(core_test\\+0x"));
}

TEST(StackTraces, TellThreadsInTheSameFunctionsOnce) {
  prepare_stack_traces();
  const Sleepers sleepers(3, function_to_be_found);
  std::string text;
  // Until all three have gone to sleep.
  for (int tries = 0; tries < 1000 && text.find("threads ") == std::string::npos; ++tries)
    text = stack_traces();
  EXPECT_THAT(text, ContainsRegex("threads [0-9]+, [0-9]+(, [0-9]+)? \\(sleeper\\), [a-z]+\n"));
}

TEST(StackTraces, LeaveOutWhoAsksAndWhoseNameIsGiven) {
  prepare_stack_traces();
  const Sleepers sleepers(1, function_to_be_found);
  const Sleepers deaf(1, deaf_function);
  const std::string text = stack_traces("sleeper");
  EXPECT_THAT(text, Not(HasSubstr("function_to_be_found")));
  EXPECT_THAT(text, Not(HasSubstr(std::to_string(gettid()))));
  EXPECT_THAT(text, ContainsRegex("thread [0-9]+ \\(deaf\\), [a-z]+, gave no answer\n"));
}

}  // namespace
}  // namespace normformer
