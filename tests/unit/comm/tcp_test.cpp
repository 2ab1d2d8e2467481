#include "normformer/comm/tcp.h"

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <thread>

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include "normformer/core/error.h"

#include "support/comm_contract.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using testing::ContractCase;
using ::testing::Each;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr double kSeconds = 60.0;

// A folder that goes with its owner.
class Folder {
 public:
  Folder() {
    std::string name = ::testing::TempDir() + "tcp_test_XXXXXX";
    path_ = mkdtemp(name.data());
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { std::filesystem::remove_all(path_); }

  std::filesystem::path file() const { return path_ / "meeting"; }
  std::string address() const { return "file://" + file().string(); }

 private:
  std::filesystem::path path_;
};

// A socket of a test that knows nothing of the protocol, on this host.
class RawSocket {
 public:
  RawSocket() : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {}
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;
  ~RawSocket() { close(socket_); }

  // Listens on a free port.
  int listen_somewhere() {
    sockaddr_in at = here(0);
    socklen_t length = sizeof at;
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&at), length), 0);
    EXPECT_EQ(listen(socket_, 16), 0);
    EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&at), &length), 0);
    return ntohs(at.sin_port);
  }

  // Tries until somebody listens.
  void connect_to(int port) {
    sockaddr_in at = here(port);
    while (connect(socket_, reinterpret_cast<sockaddr*>(&at), sizeof at) != 0) {
      std::this_thread::sleep_for(10ms);
    }
  }

  void say(const std::string& text) { send(socket_, text.data(), text.size(), MSG_NOSIGNAL); }

 private:
  static sockaddr_in here(int port) {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons(static_cast<uint16_t>(port));
    return at;
  }

  int socket_;
};

int free_port() { return RawSocket().listen_somewhere(); }

std::string loopback_address() { return "tcp://127.0.0.1:" + std::to_string(free_port()); }

Rendezvous rendezvous(int rank, int size, const std::string& address, const std::string& job = "") {
  return {rank, size, rank, size, address, job};
}

// Runs body(rank) on a thread for each rank; what each has thrown, "" where nothing.
std::vector<std::string> failures_of(int ranks, const std::function<void(int rank)>& body) {
  std::vector<std::string> failures(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (const std::exception& e) {
        failures[static_cast<size_t>(rank)] = e.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

// The same with a world, which the body owns.
std::vector<std::string> failures_of_world(int ranks, const std::function<void(Group)>& body) {
  const Folder folder;
  return failures_of(
      ranks, [&](int rank) { body(make_tcp_world(rendezvous(rank, ranks, folder.address()), kSeconds)); });
}

void run_world(int ranks, const std::function<void(Group)>& body) {
  EXPECT_THAT(failures_of_world(ranks, body), Each(""));
}

// A tensor whose values tell its sender.
Tensor numbered(Context& context, int64_t count, int sender) {
  const Tensor tensor = context.empty({count}, DType::i64);
  std::iota(tensor.data<int64_t>(), tensor.data<int64_t>() + count, int64_t{sender} << 40);
  return tensor;
}

bool is_numbered(const Tensor& tensor, int sender) {
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (tensor.data<int64_t>()[i] != (int64_t{sender} << 40) + i) return false;
  }
  return true;
}

class TcpWorld : public ::testing::TestWithParam<std::tuple<int, ContractCase>> {};

TEST_P(TcpWorld, KeepsTheContract) {
  const auto& [ranks, contract] = GetParam();
  run_world(ranks, contract.check);
}

INSTANTIATE_TEST_SUITE_P(Worlds, TcpWorld,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 5),
                                            ::testing::ValuesIn(testing::comm_contract())),
                         [](const auto& instance) {
                           return std::get<1>(instance.param).name + "Over" +
                                  std::to_string(std::get<0>(instance.param));
                         });

constexpr int64_t kLarge = (64 << 20) / 8;  // 64 MiB

TEST(TcpMessages, LargeOnesCrossInACollective) {
  run_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    const Tensor whole = context.empty({2 * kLarge}, DType::i64);
    const std::vector<int64_t> counts = {kLarge, kLarge};
    world.all_gather(context, numbered(context, kLarge, world.rank()), whole, counts);
    EXPECT_TRUE(is_numbered(whole.flat(0, kLarge), 0));
    EXPECT_TRUE(is_numbered(whole.flat(kLarge, kLarge), 1));
  });
}

TEST(TcpMessages, LargeOnesCrossEachOther) {
  run_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    const int other = 1 - world.rank();
    const Tensor received = context.empty({kLarge}, DType::i64);
    CommRequest request = world.send(context, numbered(context, kLarge, world.rank()), other, 3);
    world.receive(context, received, other, 3);
    request.wait();
    EXPECT_TRUE(is_numbered(received, other));
  });
}

TEST(TcpMessages, SendingDoesNotWaitForTheReceiver) {
  run_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    if (world.rank() == 0) {
      CommRequest request = world.send(context, numbered(context, kLarge, 7), 1, 0);
      world.barrier();
      request.wait();
    } else {
      const Tensor received = context.empty({kLarge}, DType::i64);
      world.barrier();
      world.receive(context, received, 0, 0);
      EXPECT_TRUE(is_numbered(received, 7));
    }
    world.barrier();
  });
}

TEST(TcpMessages, OneIsReceivedWhetherItIsExpectedHalfThereOrComplete) {
  run_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    for (int round = 0; round < 8; ++round) {
      world.barrier();
      if (world.rank() == 0) {
        if (round == 0) std::this_thread::sleep_for(50ms);
        world.send(context, numbered(context, kLarge / 8, round), 1, 0).wait();
      } else {
        std::this_thread::sleep_for(2ms * round);
        const Tensor received = context.empty({kLarge / 8}, DType::i64);
        world.receive(context, received, 0, 0);
        EXPECT_TRUE(is_numbered(received, round)) << "round " << round;
      }
    }
  });
}

TEST(TcpMessages, ManySmallOnesKeepTheirOrder) {
  run_world(3, [](const Group& world) {
    Context context(DeviceKind::cpu);
    const int next = (world.rank() + 1) % 3;
    const int previous = (world.rank() + 2) % 3;
    constexpr int kMessages = 5000;
    std::vector<CommRequest> requests;
    for (int i = 0; i < kMessages; ++i) {
      requests.push_back(world.send(context, numbered(context, 1 + i % 5, i), next, i % 7));
    }
    for (int i = 0; i < kMessages; ++i) {
      const Tensor received = context.empty({1 + i % 5}, DType::i64);
      world.receive(context, received, previous, i % 7);
      EXPECT_TRUE(is_numbered(received, i)) << "message " << i;
    }
    for (CommRequest& request : requests) request.wait();
  });
}

TEST(TcpMessages, GroupsOfSeveralThreadsShareTheConnections) {
  run_world(3, [](const Group& world) {
    const Group other = world.split_by([](int r) { return SplitChoice{0, -r}; }, "other");
    const auto work = [](const Group& group) {
      Context context(DeviceKind::cpu);
      for (int round = 0; round < 100; ++round) {
        const Tensor whole = context.empty({3 * 4000}, DType::i64);
        const std::vector<int64_t> counts(3, 4000);
        group.all_gather(context, numbered(context, 4000, group.rank() + round), whole, counts);
        for (int r = 0; r < 3; ++r) EXPECT_TRUE(is_numbered(whole.flat(r * 4000, 4000), r + round));
      }
    };
    std::thread beside(work, std::cref(other));
    work(world);
    beside.join();
  });
}

TEST(TcpMessages, OneWhoseRequestDiesGoesOnAsACopy) {
  run_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    if (world.rank() == 0) {
      const Tensor tensor = numbered(context, kLarge, 5);
      try {
        const CommRequest request = world.send(context, tensor, 1, 0);
        throw std::domain_error("something else");
      } catch (const std::domain_error&) {
        fill_zero(context, tensor);
      }
    } else {
      const Tensor received = context.empty({kLarge}, DType::i64);
      world.receive(context, received, 0, 0);
      EXPECT_TRUE(is_numbered(received, 5));
    }
    world.barrier();
  });
}

// --- Failures ---

// Rank 2 of 4 dies while the others wait in `wait`; all must wake soon and name it.
void expect_wakes(const std::function<void(const Group&, Context&, const Tensor&)>& wait) {
  const auto start = std::chrono::steady_clock::now();
  const auto failures = failures_of_world(4, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const Tensor tensor = context.zeros({4'000'000}, DType::f32);
    world.barrier();
    if (world.rank() == 2) throw std::domain_error("the disk is on fire");
    wait(world, context, tensor);
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, 20s);
  for (const int woken : {0, 1, 3}) {
    EXPECT_EQ(failures[static_cast<size_t>(woken)],
              "rank 2 (host " + host_name() + ") closed its connection");
  }
  EXPECT_EQ(failures[2], "the disk is on fire");
}

TEST(TcpFailures, WakeThoseInACollective) {
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    world.all_reduce(context, tensor, ReduceOp::sum);
  });
  expect_wakes([](const Group& world, Context&, const Tensor&) { world.barrier(); });
}

TEST(TcpFailures, WakeThoseWhoWaitForSomebodyElse) {
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    world.receive(context, tensor, world.rank() == 0 ? 1 : 0, 0);
  });
}

TEST(TcpFailures, WakeThoseInAnotherGroup) {
  const auto failures = failures_of_world(4, [](const Group& world) {
    const Group pair = world.split({world.rank() / 2, 0}, "pair");
    if (world.rank() == 3) throw std::domain_error("alone");
    // Ranks 0 and 1 keep each other company for ever; 2 waits for 3.
    while (true) pair.barrier();
  });
  for (int r = 0; r < 3; ++r) {
    EXPECT_THAT(failures[static_cast<size_t>(r)], HasSubstr("rank 3 (host")) << "rank " << r;
  }
}

TEST(TcpFailures, LeaveTheMemoryOfACollectiveToItsCaller) {
  for (int round = 0; round < 4; ++round) {
    const auto failures = failures_of_world(3, [&](const Group& world) {
      const Group pair = world.split({world.rank() / 2, 0}, "pair");
      Context context(DeviceKind::cpu);
      const Tensor tensor = context.zeros({world.rank() == 2 ? 0 : 1 << 21}, DType::f32);
      world.barrier();
      if (world.rank() == 2) {
        std::this_thread::sleep_for(5ms + 3ms * round);
        throw std::domain_error("at some point");
      }
      try {
        while (true) pair.broadcast(context, tensor, 0);
      } catch (const CommError&) {
        fill_zero(context, tensor);
        throw;
      }
    });
    EXPECT_THAT(failures[0], HasSubstr("rank 2 (host"));
    EXPECT_THAT(failures[1], HasSubstr("rank 2 (host"));
  }
}

TEST(TcpFailures, AMessageOfAnotherSizeIsAnError) {
  const auto failures = failures_of_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    if (world.rank() == 0) world.send(context, context.zeros({4}, DType::f32), 1, 0).wait();
    if (world.rank() == 1) world.receive(context, context.zeros({5}, DType::f32), 0, 0);
    world.barrier();
  });
  EXPECT_THAT(failures, Each(AllOf(HasSubstr("rank 0 (host"), HasSubstr("sent 16 bytes where rank 1 (host"),
                                   HasSubstr("expected 20"))));
}

TEST(TcpFailures, WhoeverLeavesInGoodOrderDisturbsNobody) {
  run_world(3, [](const Group& world) {
    const Group pair = world.split({world.rank() == 2 ? -1 : 0, 0}, "pair");
    for (int round = 0; round < 300 && pair.defined(); ++round) {
      if (round < 30) std::this_thread::sleep_for(10ms);
      pair.barrier();
    }
  });
}

TEST(TcpFailures, WaitingForOneWhoHasLeftIsAnError) {
  const auto failures = failures_of_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    if (world.rank() == 0) world.receive(context, context.zeros({4}, DType::f32), 1, 0);
  });
  EXPECT_THAT(failures[0], AllOf(HasSubstr("rank 1 (host"), HasSubstr("has ended")));
  EXPECT_EQ(failures[1], "");
}

TEST(TcpFailures, WaitingForOnesOwnMessageIsAnError) {
  const auto failures = failures_of_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    world.receive(context, context.zeros({4}, DType::f32), world.rank(), 0);
  });
  EXPECT_THAT(failures[0] + failures[1], HasSubstr("a message to itself that it has not sent"));
}

// --- Meeting ---

TEST(TcpMeeting, ALateRankIsWaitedFor) {
  const std::string address = loopback_address();
  EXPECT_THAT(failures_of(3,
                          [&](int rank) {
                            std::this_thread::sleep_for(rank == 1 ? 1500ms : 0ms);
                            make_tcp_world(rendezvous(rank, 3, address), kSeconds).barrier();
                          }),
              Each(""));
}

TEST(TcpMeeting, RankZeroMayBeTheLast) {
  const std::string address = loopback_address();
  EXPECT_THAT(failures_of(3,
                          [&](int rank) {
                            std::this_thread::sleep_for(rank == 0 ? 1s : 0s);
                            const Group world = make_tcp_world(rendezvous(rank, 3, address), kSeconds);
                            EXPECT_EQ(rank_label(), rank);
                            EXPECT_EQ(world.rank(), rank);
                            EXPECT_EQ(world.size(), 3);
                          }),
              Each(""));
}

TEST(TcpMeeting, AMissingRankIsNamedToAll) {
  const std::string address = loopback_address();
  const auto failures = failures_of(4, [&](int rank) {
    if (rank != 2) make_tcp_world(rendezvous(rank, 4, address), 1.5);
  });
  for (const int r : {0, 1, 3}) {
    EXPECT_EQ(failures[static_cast<size_t>(r)],
              "rank 2 of 4 did not come to " + address + " within 1.5 seconds");
  }
}

TEST(TcpMeeting, AMissingRankZeroIsNamed) {
  try {
    make_tcp_world(rendezvous(1, 2, loopback_address()), 0.5);
    FAIL() << "met nobody";
  } catch (const CommError& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("rank 1 did not find rank 0 of 2 at tcp://127.0.0.1"),
                                HasSubstr("Connection refused")));
  }
}

TEST(TcpMeeting, AJobOfAnotherSizeIsRefused) {
  const std::string address = loopback_address();
  const auto failures =
      failures_of(2, [&](int rank) { make_tcp_world(rendezvous(rank, 2 + rank, address), 1.5); });
  EXPECT_THAT(failures[0], AllOf(HasSubstr("rank 1 of 2 did not come"), HasSubstr("refused: rank 1 (host"),
                                 HasSubstr("is of a job of 2 ranks, not 3")));
  EXPECT_THAT(failures[1], AllOf(HasSubstr("rank 0 (host"), HasSubstr("is of a job of 2 ranks, not 3")));
}

TEST(TcpMeeting, AnotherJobAndARankTwiceAreRefused) {
  const std::string address = loopback_address();
  const auto failures = failures_of(3, [&](int rank) {
    const std::string job = rank == 2 ? "theirs" : "ours";
    make_tcp_world(rendezvous(std::min(rank, 1), 2, address, job), rank == 2 ? 1.5 : kSeconds).barrier();
  });
  EXPECT_EQ(failures[0], "");
  EXPECT_EQ(failures[1], "");
  EXPECT_THAT(failures[2], HasSubstr("rank 1 did not find rank 0"));

  const auto twice =
      failures_of(3, [&](int rank) { make_tcp_world(rendezvous(std::min(rank, 1), 3, address), 1.5); });
  EXPECT_THAT(twice[0], HasSubstr("rank 2 of 3 did not come"));
  EXPECT_THAT(twice[1] + twice[2], HasSubstr("rank 1 (host " + host_name() + ") is there already"));
}

TEST(TcpMeeting, StrangersDoNoHarm) {
  const int port = free_port();
  const std::string address = "tcp://127.0.0.1:" + std::to_string(port);
  EXPECT_THAT(failures_of(3,
                          [&](int rank) {
                            if (rank == 2) {
                              RawSocket silent;
                              RawSocket curious;
                              RawSocket binary;
                              RawSocket brief;
                              silent.connect_to(port);
                              curious.connect_to(port);
                              curious.say("GET / HTTP/1.1\r\nHost: here\r\n\r\n");
                              binary.connect_to(port);
                              binary.say(std::string(100'000, '\xff'));
                              brief.connect_to(port);
                              brief.say("normt");
                              make_tcp_world(rendezvous(2, 3, address), kSeconds).barrier();
                              return;
                            }
                            make_tcp_world(rendezvous(rank, 3, address), kSeconds).barrier();
                          }),
              Each(""));
}

TEST(TcpMeeting, WorksOverIPv6) {
  const int probe = ::socket(AF_INET6, SOCK_STREAM, 0);
  sockaddr_in6 at{};
  at.sin6_family = AF_INET6;
  at.sin6_addr = in6addr_loopback;
  const bool there = probe >= 0 && bind(probe, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0;
  if (probe >= 0) close(probe);
  if (!there) GTEST_SKIP() << "this host has no IPv6";
  const std::string address = "tcp://[::1]:" + std::to_string(free_port());
  EXPECT_THAT(
      failures_of(3, [&](int rank) { make_tcp_world(rendezvous(rank, 3, address), kSeconds).barrier(); }),
      Each(""));
}

// Three ranks that meet by a file where `stale` lies already; the first comes last.
void expect_met_despite(const std::string& stale) {
  const Folder folder;
  std::ofstream(folder.file()) << stale;
  EXPECT_THAT(
      failures_of(3,
                  [&](int rank) {
                    std::this_thread::sleep_for(rank == 0 ? 700ms : 0ms);
                    make_tcp_world(rendezvous(rank, 3, folder.address(), "job 5"), kSeconds).barrier();
                  }),
      Each(""));
  EXPECT_FALSE(std::filesystem::exists(folder.file()));
}

std::string meeting_file(const std::string& job, int port) {
  return "normformer rendezvous 1\n" + job + "\n3\n12345\n" + std::to_string(port) + "\nlocalhost\n";
}

TEST(TcpMeeting, AStaleFileIsNotMistaken) {
  expect_met_despite(meeting_file("job 4", free_port()));
  expect_met_despite(meeting_file("job 5", free_port()));
}

TEST(TcpMeeting, AStaleFileMayLeadToAStranger) {
  RawSocket stranger;
  expect_met_despite(meeting_file("job 5", stranger.listen_somewhere()));
}

TEST(TcpMeeting, AStaleFileMayLeadToAnotherJob) {
  const int port = free_port();
  std::thread other([&] {
    EXPECT_THROW(make_tcp_world(rendezvous(0, 3, "tcp://127.0.0.1:" + std::to_string(port), "job 5"), 3.0),
                 CommError);
  });
  expect_met_despite(meeting_file("job 5", port));
  other.join();
}

TEST(TcpMeeting, AFileOfAnotherKindIsLeftAlone) {
  const Folder folder;
  std::ofstream(folder.file()) << "a poem\n";
  EXPECT_THROW(make_tcp_world(rendezvous(0, 2, folder.address()), 1.0), ConfigError);
  EXPECT_TRUE(std::filesystem::exists(folder.file()));
}

TEST(TcpMeeting, AddressesThatAreNoneAreRefused) {
  for (const char* address : {"", "tcp://", "tcp://host", "tcp://host:", "tcp://host:x", "tcp://host:70000",
                              "tcp://::1:80", "tcp://:80", "udp://host:80", "file://", "file://relative"}) {
    EXPECT_THROW(make_tcp_world(rendezvous(0, 2, address), 0.1), ConfigError) << address;
  }
}

TEST(TcpMeeting, ATakenPortIsAnError) {
  RawSocket taken;
  const std::string address = "tcp://127.0.0.1:" + std::to_string(taken.listen_somewhere());
  try {
    make_tcp_world(rendezvous(0, 2, address), 1.0);
    FAIL() << "listened";
  } catch (const CommError& e) {
    EXPECT_THAT(e.what(), HasSubstr("Address already in use"));
  }
}

TEST(TcpMeeting, OneRankMeetsNobody) {
  const Group world = make_tcp_world({});
  EXPECT_EQ(world.size(), 1);
}

// --- The environment ---

using Settings = std::vector<std::pair<std::string, std::string>>;

// The environment with these settings only, of those that matter here.
class Environment {
 public:
  explicit Environment(const Settings& settings) {
    for (const char* name : kNames) {
      const char* value = std::getenv(name);
      if (value != nullptr) before_.emplace_back(name, value);
      unsetenv(name);
    }
    for (const auto& [name, value] : settings) setenv(name.c_str(), value.c_str(), 1);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() {
    for (const char* name : kNames) unsetenv(name);
    for (const auto& [name, value] : before_) setenv(name.c_str(), value.c_str(), 1);
  }

 private:
  static constexpr const char* kNames[] = {"RANK",
                                           "WORLD_SIZE",
                                           "LOCAL_RANK",
                                           "LOCAL_WORLD_SIZE",
                                           "MASTER_ADDR",
                                           "MASTER_PORT",
                                           "SLURM_PROCID",
                                           "SLURM_NTASKS",
                                           "SLURM_LOCALID",
                                           "NORMFORMER_RENDEZVOUS",
                                           "NORMFORMER_JOB_ID",
                                           "SLURM_JOB_ID"};
  Settings before_;
};

std::optional<Rendezvous> found_in(const Settings& settings) {
  const Environment environment(settings);
  return rendezvous_from_environment();
}

void expect_found(const Settings& settings, const Rendezvous& expected) {
  const auto found = found_in(settings);
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->rank, expected.rank);
  EXPECT_EQ(found->size, expected.size);
  EXPECT_EQ(found->local_rank, expected.local_rank);
  EXPECT_EQ(found->local_size, expected.local_size);
  EXPECT_EQ(found->address, expected.address);
  EXPECT_EQ(found->job, expected.job);
}

TEST(TcpEnvironment, TorchrunsNamesAreRead) {
  expect_found({{"RANK", "5"},
                {"WORLD_SIZE", "8"},
                {"LOCAL_RANK", "1"},
                {"LOCAL_WORLD_SIZE", "4"},
                {"MASTER_ADDR", "node7"},
                {"MASTER_PORT", "29500"}},
               {5, 8, 1, 4, "tcp://node7:29500", ""});
  expect_found({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "fd00::7"}, {"MASTER_PORT", "29500"}},
               {0, 2, -1, 0, "tcp://[fd00::7]:29500", ""});
  expect_found({{"RANK", "0"}, {"WORLD_SIZE", "1"}}, {0, 1, -1, 0, "", ""});
}

TEST(TcpEnvironment, OurAddressWinsOverTorchruns) {
  expect_found({{"RANK", "1"},
                {"WORLD_SIZE", "2"},
                {"MASTER_ADDR", "node7"},
                {"MASTER_PORT", "29500"},
                {"NORMFORMER_RENDEZVOUS", "file:///shared/x"},
                {"NORMFORMER_JOB_ID", "mine"},
                {"SLURM_JOB_ID", "77"}},
               {1, 2, -1, 0, "file:///shared/x", "mine"});
}

TEST(TcpEnvironment, SlurmsNamesAreRead) {
  expect_found({{"SLURM_PROCID", "3"},
                {"SLURM_NTASKS", "4"},
                {"SLURM_LOCALID", "1"},
                {"SLURM_JOB_ID", "77"},
                {"NORMFORMER_RENDEZVOUS", "tcp://node7:1234"}},
               {3, 4, 1, 0, "tcp://node7:1234", "77"});
  // torchrun started by srun, one a host.
  expect_found({{"SLURM_PROCID", "1"},
                {"SLURM_NTASKS", "2"},
                {"RANK", "9"},
                {"WORLD_SIZE", "16"},
                {"MASTER_ADDR", "node7"},
                {"MASTER_PORT", "29500"}},
               {9, 16, -1, 0, "tcp://node7:29500", ""});
}

TEST(TcpEnvironment, NothingMeansAnotherLauncherOrNone) {
  EXPECT_FALSE(found_in({}));
  EXPECT_FALSE(found_in({{"RANK", ""}, {"WORLD_SIZE", ""}}));
  // What a batch script has, and what mpirun passes on from it.
  EXPECT_FALSE(found_in({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "77"}}));
}

TEST(TcpEnvironment, IncompleteOrContradictorySettingsAreRefused) {
  const Settings meeting = {{"MASTER_ADDR", "node7"}, {"MASTER_PORT", "29500"}};
  const auto refused = [&](Settings settings, bool with_address = true) {
    if (with_address) settings.insert(settings.end(), meeting.begin(), meeting.end());
    EXPECT_THROW(found_in(settings), ConfigError) << ::testing::PrintToString(settings);
  };
  refused({});
  refused({{"RANK", "1"}});
  refused({{"WORLD_SIZE", "2"}});
  refused({{"RANK", "2"}, {"WORLD_SIZE", "2"}});
  refused({{"RANK", "-1"}, {"WORLD_SIZE", "2"}});
  refused({{"RANK", "one"}, {"WORLD_SIZE", "2"}});
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}}, false);
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "1"}});
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "3"}});
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "node7"}}, false);
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "x"}}, false);
  refused({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"NORMFORMER_RENDEZVOUS", "node7:29500"}});
  refused({{"SLURM_PROCID", "1"}});
}

}  // namespace
}  // namespace normformer
