// GoogleTest's main for MPI tests: every rank runs every test, each rank prints its own failures, all agree
// on each verdict, and a watchdog ends a test that hangs.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include <gtest/gtest.h>
#include <mpi.h>

#include "support/mpi_world.h"

namespace {

std::optional<normformer::MpiSession> session;

// Ends the job when one test outlives its limit, naming the rank and the test.
class Watchdog {
 public:
  Watchdog(int rank, int seconds) : rank_(rank), limit_(seconds), thread_([this] { run(); }) {}
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog() {
    set([&] { stop_ = true; });
    thread_.join();
  }

  void arm(std::string test) {
    set([&] {
      test_ = std::move(test);
      armed_ = true;
      ++epoch_;
    });
  }

  void disarm() {
    set([&] {
      armed_ = false;
      ++epoch_;
    });
  }

 private:
  template <class Change>
  void set(Change change) {
    {
      const std::lock_guard lock(mutex_);
      change();
    }
    wake_.notify_one();
  }

  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || armed_; });
      if (stop_) return;
      const unsigned epoch = epoch_;
      const auto moved_on = [&] { return stop_ || epoch_ != epoch; };
      if (wake_.wait_for(lock, std::chrono::seconds(limit_), moved_on)) continue;
      std::fprintf(stderr, "[rank %d] watchdog: %s still runs after %d s\n", rank_, test_.c_str(), limit_);
      std::fflush(stderr);
      std::_Exit(124);  // mpirun then ends the other ranks
    }
  }

  const int rank_;
  const int limit_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::string test_;
  unsigned epoch_ = 0;
  bool armed_ = false;
  bool stop_ = false;
  std::thread thread_;  // last, so that it finds the others made
};

class MpiListener final : public ::testing::EmptyTestEventListener {
 public:
  MpiListener(MPI_Comm communicator, int rank, Watchdog& watchdog)
      : communicator_(communicator), rank_(rank), watchdog_(watchdog) {}

  void OnTestStart(const ::testing::TestInfo& test) override {
    watchdog_.arm(std::string(test.test_suite_name()) + "." + test.name());
  }

  // Never communicates: it is not called on every rank.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed() || rank_ == 0) return;
    const char* file = result.file_name() == nullptr ? "?" : result.file_name();
    std::fprintf(stderr, "[rank %d] %s:%d\n%s\n", rank_, file, result.line_number(), result.message());
  }

  void OnTestEnd(const ::testing::TestInfo& test) override {
    const int mine = test.result()->Failed() ? 1 : 0;
    int failed = 0;
    MPI_Allreduce(&mine, &failed, 1, MPI_INT, MPI_SUM, communicator_);
    watchdog_.disarm();
    if (failed > 0 && mine == 0) ADD_FAILURE() << "failed on " << failed << " other rank(s)";
  }

 private:
  MPI_Comm communicator_;
  int rank_;
  Watchdog& watchdog_;
};

int run_tests(MPI_Comm communicator) {
  const char* limit = std::getenv("NORMFORMER_TEST_WATCHDOG");
  const int rank = session->world().rank();
  Watchdog watchdog(rank, limit == nullptr ? 60 : std::atoi(limit));
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
  }
  listeners.Append(new MpiListener(communicator, rank, watchdog));
  const int mine = RUN_ALL_TESTS();
  int result = 0;
  MPI_Allreduce(&mine, &result, 1, MPI_INT, MPI_MAX, communicator);
  return result;
}

}  // namespace

normformer::MpiSession& normformer::testing::mpi_session() { return *session; }

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  session.emplace(&argc, &argv);
  MPI_Comm communicator = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &communicator);  // the harness never shares one with a test
  const int result = run_tests(communicator);
  MPI_Comm_free(&communicator);
  session.reset();
  return result;
}
