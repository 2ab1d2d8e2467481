// Saving and reading checkpoints beside what `dd` does with as many bytes of the same disk in the same run.
//
//   bench_checkpoint_io FOLDER [MIB of all ranks = 1024] [RANKS = 1] [ROUNDS = 5]
//
// Rounds go through dd's write, a save, dd's read and a read in turn, with the system's cached pages dropped
// before each (needs root; else reads come from memory, for both alike). Printed are medians, and ratios to
// dd's.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/error.h"
#include "normformer/mesh/layout.h"
#include "normformer/tensor/context.h"

namespace normformer {
namespace {

namespace fs = std::filesystem;

double seconds_of(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void shell(const std::string& command) {
  if (std::system(command.c_str()) != 0) throw IoError("failed: " + command);
}

void drop_cached_pages() {
  sync();
  std::ofstream("/proc/sys/vm/drop_caches") << "3\n";
}

struct Bench {
  fs::path folder;
  int64_t mib;
  int ranks;

  // Tensors of 64 MiB, each rank with its even part of each.
  std::vector<TensorPiece> pieces(Context& context, int rank, bool filled) const {
    constexpr int64_t kRows = 4096;
    std::vector<TensorPiece> made;
    for (int64_t i = 0; i < mib / 64; ++i) {
      const Rectangle whole{{0, kRows}, {0, kRows}, kRows, kRows};
      const Range part = even_part(whole.numel(), ranks, rank);
      made.push_back({fmt::format("decoder.layers.{:03}.weight", i), Role::master, whole, part,
                      context.empty({part.size()}, DType::f32)});
      auto* values = static_cast<float*>(made.back().data.raw());
      for (int64_t e = 0; e < part.size(); ++e) values[e] = filled ? static_cast<float>(e ^ i) : 0.0f;
    }
    return made;
  }

  // The slowest rank's time of `body(world, pieces)`.
  double over_ranks(bool filled,
                    const std::function<void(const Group&, std::span<const TensorPiece>)>& body) const {
    double slowest = 0.0;
    run_local_world(ranks, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const std::vector<TensorPiece> mine = pieces(context, world.rank(), filled);
      world.barrier();
      if (world.rank() == 0) drop_cached_pages();
      world.barrier();
      const double seconds = seconds_of([&] {
        body(world, mine);
        world.barrier();
      });
      if (world.rank() == 0) slowest = seconds;
    });
    return slowest;
  }

  double dd_write() const {
    drop_cached_pages();
    return seconds_of([&] {
      shell(fmt::format("dd if=/dev/zero of={} bs=4M count={} conv=fsync status=none",
                        (folder / "dd").string(), mib / 4));
    });
  }

  double dd_read() const {
    drop_cached_pages();
    return seconds_of(
        [&] { shell(fmt::format("dd if={} of=/dev/null bs=4M status=none", (folder / "dd").string())); });
  }

  double save(FileSystem& files, int64_t update) const {
    return over_ranks(true, [&](const Group& world, std::span<const TensorPiece> mine) {
      CheckpointInfo info;
      info.update_count = update;
      const SaveResult result =
          save_checkpoint(world, files, folder / "checkpoints", info, mine, {.keep = 1});
      if (!result) throw IoError(result.reason);
    });
  }

  double load(FileSystem& files) const {
    return over_ranks(false, [&](const Group& world, std::span<const TensorPiece> mine) {
      open_newest_checkpoint(world, files, folder / "checkpoints",
                             [&](const CheckpointReader& r) { r.read(mine); });
    });
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void run(const Bench& bench, int rounds) {
  const auto files = make_system_files();
  fs::create_directories(bench.folder);
  std::vector<double> times[4];
  for (int round = 0; round < rounds; ++round) {
    times[0].push_back(bench.dd_write());
    times[1].push_back(bench.save(*files, round + 1));
    times[2].push_back(bench.dd_read());
    times[3].push_back(bench.load(*files));
  }
  const auto rate = [&](int i) { return static_cast<double>(bench.mib) / median(times[i]); };
  fmt::print("{} MiB, {} ranks, medians of {} rounds\n", bench.mib, bench.ranks, rounds);
  fmt::print("{:<8}{:>10}{:>14}{:>8}\n", "", "dd MiB/s", "ours MiB/s", "ratio");
  fmt::print("{:<8}{:>10.0f}{:>14.0f}{:>8.2f}\n", "save", rate(0), rate(1), rate(1) / rate(0));
  fmt::print("{:<8}{:>10.0f}{:>14.0f}{:>8.2f}\n", "read", rate(2), rate(3), rate(3) / rate(2));
  fs::remove_all(bench.folder / "checkpoints");
  fs::remove(bench.folder / "dd");
}

}  // namespace
}  // namespace normformer

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "bench_checkpoint_io FOLDER [MIB = 1024] [RANKS = 1] [ROUNDS = 5]\n");
    return 64;
  }
  const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  normformer::run({argv[1], number(2, 1024), number(3, 1)}, number(4, 5));
  return 0;
}
