#include "support/comm_contract.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/tensor/dispatch.h"

namespace normformer::testing {

namespace {

DeviceKind contract_device = DeviceKind::cpu;

constexpr int64_t kCounts[] = {0, 1, 7, 1000, 100003};

// Element i of rank r: of widely different sizes, so that another order of additions gives other bits.
double value_at(int rank, int64_t i) {
  uint64_t x =
      static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(rank + 1) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 31)) * 0x94D049BB133111EBu;
  x ^= x >> 29;
  const double fraction = static_cast<double>(x >> 11) * 0x1p-53 - 0.5;
  return std::ldexp(fraction, static_cast<int>(x % 23));
}

template <class T>
T stored(double value) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(static_cast<float>(value));
  else if constexpr (std::is_same_v<T, f16>)
    return f16(static_cast<float>(std::ldexp(value, -8)));  // sums stay in range
  else
    return static_cast<T>(value);
}

template <class T>
Accumulator<T> widened(T value) {
  return static_cast<Accumulator<T>>(value);
}

template <class T>
Tensor make(Context& context, int rank, int64_t count, int64_t first = 0) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(stored<T>(value_at(rank, first + i)));
  return from_host<T>(context, values, {count});
}

// The sum over ranks of element i, added in rank order and rounded once: plain loops, written apart from the
// library's.
template <class T>
T expected_sum(int ranks, int64_t i) {
  Accumulator<T> sum = widened(stored<T>(value_at(0, i)));
  for (int r = 1; r < ranks; ++r) sum += widened(stored<T>(value_at(r, i)));
  if constexpr (kIs16Bit<T>)
    return T(sum);
  else
    return sum;
}

// How many elements differ in bits from what is expected.
template <class T, class Expected>
int64_t wrong_bits(const Tensor& tensor, Expected&& expected) {
  int64_t wrong = 0;
  std::vector<T> values(static_cast<size_t>(tensor.numel()));
  tensor.copy_out(values.data());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    const T want = expected(i);
    wrong += std::memcmp(&values[static_cast<size_t>(i)], &want, sizeof(T)) != 0;
  }
  return wrong;
}

// Uneven pieces, some of them empty.
std::vector<int64_t> uneven_counts(int ranks, int64_t scale) {
  std::vector<int64_t> counts;
  for (int r = 0; r < ranks; ++r) counts.push_back((r * 3 + 2) % 5 * scale + r % 2);
  if (ranks > 2) counts[2] = 0;
  return counts;
}

int64_t sum_of(const std::vector<int64_t>& counts, int before) {
  return std::accumulate(counts.begin(), counts.begin() + before, int64_t{0});
}

template <class T>
void all_reduce_sum(const Group& world) {
  Context context(contract_device);
  for (const int64_t count : kCounts) {
    const Tensor tensor = make<T>(context, world.rank(), count);
    world.all_reduce(context, tensor, ReduceOp::sum);
    EXPECT_EQ(wrong_bits<T>(tensor, [&](int64_t i) { return expected_sum<T>(world.size(), i); }), 0)
        << count << " elements";
  }
}

template <class T>
void all_reduce_max(const Group& world) {
  Context context(contract_device);
  for (const int64_t count : kCounts) {
    const Tensor tensor = make<T>(context, world.rank(), count);
    world.all_reduce(context, tensor, ReduceOp::max);
    EXPECT_EQ(wrong_bits<T>(tensor,
                            [&](int64_t i) {
                              T most = stored<T>(value_at(0, i));
                              for (int r = 1; r < world.size(); ++r) {
                                most = std::max(most, stored<T>(value_at(r, i)));
                              }
                              return most;
                            }),
              0)
        << count << " elements";
  }
}

void a_nan_wins_the_maximum(const Group& world) {
  Context context(contract_device);
  for (int from = 0; from < world.size(); ++from) {
    const double mine = world.rank() == from ? std::nan("") : 1.0 + world.rank();
    const Tensor tensor = from_host<double>(context, std::vector<double>{mine, 5.0}, {2});
    world.all_reduce(context, tensor, ReduceOp::max);
    const std::vector<double> most = to_host(tensor);
    EXPECT_TRUE(std::isnan(most[0])) << "from rank " << from;
    EXPECT_EQ(most[1], 5.0);
    EXPECT_TRUE(std::isnan(world.all_reduce(mine, ReduceOp::max)));
  }
}

void fused_all_reduce(const Group& world) {
  Context context(contract_device);
  for (const int64_t count : kCounts) {
    const std::vector<Tensor> tensors = {
        make<bf16>(context, world.rank(), count), make<float>(context, world.rank(), 2 * count + 1),
        make<float>(context, world.rank(), 0), make<double>(context, world.rank(), 3)};
    world.all_reduce_sum(context, tensors);
    const int n = world.size();
    EXPECT_EQ(wrong_bits<bf16>(tensors[0], [&](int64_t i) { return expected_sum<bf16>(n, i); }), 0) << count;
    EXPECT_EQ(wrong_bits<float>(tensors[1], [&](int64_t i) { return expected_sum<float>(n, i); }), 0)
        << count;
    EXPECT_EQ(wrong_bits<double>(tensors[3], [&](int64_t i) { return expected_sum<double>(n, i); }), 0)
        << count;
  }
  world.all_reduce_sum(context, {});
}

template <class T>
void reduce_scatter(const Group& world) {
  Context context(contract_device);
  for (const int64_t scale : {0, 1, 251, 25013}) {
    const std::vector<int64_t> counts = uneven_counts(world.size(), scale);
    const int64_t total = sum_of(counts, world.size());
    const int64_t begin = sum_of(counts, world.rank());
    const int64_t mine = counts[static_cast<size_t>(world.rank())];
    const auto expected = [&](int64_t i) { return expected_sum<T>(world.size(), begin + i); };
    const auto untouched = [&](int64_t i) { return stored<T>(value_at(world.rank(), i)); };

    const Tensor whole = make<T>(context, world.rank(), total);
    const Tensor part = make<T>(context, 99, mine);
    world.reduce_scatter_sum(context, whole, part, counts);
    EXPECT_EQ(wrong_bits<T>(part, expected), 0) << "scale " << scale;
    EXPECT_EQ(wrong_bits<T>(whole, untouched), 0) << "scale " << scale;

    world.reduce_scatter_sum(context, whole, whole.flat(begin, mine), counts);
    EXPECT_EQ(wrong_bits<T>(whole.flat(begin, mine), expected), 0) << "in place, scale " << scale;
    EXPECT_EQ(wrong_bits<T>(whole.flat(0, begin), untouched), 0) << "in place, scale " << scale;
  }
}

template <class T>
void all_gather(const Group& world) {
  Context context(contract_device);
  for (const int64_t scale : {0, 1, 251, 25013}) {
    const std::vector<int64_t> counts = uneven_counts(world.size(), scale);
    const int64_t total = sum_of(counts, world.size());
    const int64_t begin = sum_of(counts, world.rank());
    const int64_t mine = counts[static_cast<size_t>(world.rank())];
    const auto expected = [&](int64_t i) {
      int owner = 0;
      while (i >= sum_of(counts, owner + 1)) ++owner;
      return stored<T>(value_at(owner, i));
    };
    Tensor whole = make<T>(context, 99, total);
    world.all_gather(context, make<T>(context, world.rank(), mine, begin), whole, counts);
    EXPECT_EQ(wrong_bits<T>(whole, expected), 0) << "scale " << scale;

    whole = make<T>(context, 99, total);
    const Tensor place = whole.flat(begin, mine);
    copy(context, make<T>(context, world.rank(), mine, begin), place);
    world.all_gather(context, place, whole, counts);
    EXPECT_EQ(wrong_bits<T>(whole, expected), 0) << "in place, scale " << scale;
  }
}

// Tensors of several types and widths, cut by rows at once: each as if alone.
void rows_together(const Group& world) {
  Context context(contract_device);
  for (const int64_t scale : {0, 1, 251}) {
    const std::vector<int64_t> rows = uneven_counts(world.size(), scale);
    const int64_t total = sum_of(rows, world.size());
    const int64_t begin = sum_of(rows, world.rank());
    const int64_t mine = rows[static_cast<size_t>(world.rank())];
    const auto matrix = [&]<class T>(int rank, int64_t first_row, int64_t count, int64_t columns, T) {
      return make<T>(context, rank, count * columns, first_row * columns).view({count, columns});
    };
    const auto sum = [&]<class T>(int64_t columns, T) {
      return
          [&world, first = begin * columns](int64_t i) { return expected_sum<T>(world.size(), first + i); };
    };
    const RowShare scattered[] = {
        {matrix(world.rank(), 0, total, 33, bf16()), matrix(99, 0, mine, 33, bf16())},
        {matrix(world.rank(), 0, total, 2, 0.0f), matrix(99, 0, mine, 2, 0.0f)},
        {make<double>(context, world.rank(), total), make<double>(context, 99, mine)}};
    world.reduce_scatter_rows(context, scattered, rows);
    EXPECT_EQ(wrong_bits<bf16>(scattered[0].part, sum(33, bf16())), 0) << "scale " << scale;
    EXPECT_EQ(wrong_bits<float>(scattered[1].part, sum(2, 0.0f)), 0) << "scale " << scale;
    EXPECT_EQ(wrong_bits<double>(scattered[2].part, sum(1, 0.0)), 0) << "scale " << scale;

    const RowShare gathered[] = {{matrix(99, 0, total, 33, bf16()), matrix(7, begin, mine, 33, bf16())},
                                 {make<double>(context, 99, total), make<double>(context, 7, mine, begin)}};
    world.all_gather_rows(context, gathered, rows);
    const auto value = [&]<class T>(T) { return [](int64_t i) { return stored<T>(value_at(7, i)); }; };
    EXPECT_EQ(wrong_bits<bf16>(gathered[0].whole, value(bf16())), 0) << "scale " << scale;
    EXPECT_EQ(wrong_bits<double>(gathered[1].whole, value(0.0)), 0) << "scale " << scale;
  }
  world.all_gather_rows(context, {}, std::vector<int64_t>(static_cast<size_t>(world.size()), 1));
}

void all_gather_of_integers(const Group& world) {
  Context context(contract_device);
  const std::vector<int64_t> counts(static_cast<size_t>(world.size()), 1);
  const Tensor whole = context.empty({world.size()}, DType::i64);
  const std::vector<int64_t> mine = {(int64_t{1} << 60) + world.rank()};
  world.all_gather(context, from_host<int64_t>(context, mine, {1}), whole, counts);
  std::vector<int64_t> all(counts.size());
  whole.copy_out(all.data());
  for (int r = 0; r < world.size(); ++r) EXPECT_EQ(all[static_cast<size_t>(r)], (int64_t{1} << 60) + r);
}

void broadcast(const Group& world) {
  Context context(contract_device);
  for (int root = 0; root < world.size(); ++root) {
    for (const int64_t count : kCounts) {
      const Tensor tensor = make<float>(context, world.rank(), count);
      world.broadcast(context, tensor, root);
      EXPECT_EQ(wrong_bits<float>(tensor, [&](int64_t i) { return static_cast<float>(value_at(root, i)); }),
                0)
          << count << " elements from rank " << root;
    }
  }
}

void messages_keep_order_and_tags(const Group& world) {
  Context context(contract_device);
  const int next = (world.rank() + 1) % world.size();
  const int previous = (world.rank() + world.size() - 1) % world.size();
  for (const int64_t count : kCounts) {
    std::vector<CommRequest> requests;
    // The tensors go out of scope at once: the message keeps them.
    for (const int tag : {5, 0, 5, Group::kMaxTag}) {
      const auto number = static_cast<int64_t>(requests.size());
      requests.push_back(
          world.send(context, make<float>(context, world.rank(), count, 1000 * number), next, tag));
    }
    const std::pair<int, int64_t> arrivals[] = {{Group::kMaxTag, 3}, {5, 0}, {5, 2}, {0, 1}};
    for (const auto& [tag, number] : arrivals) {
      const Tensor tensor = make<float>(context, 99, count);
      world.receive(context, tensor, previous, tag);
      const auto expected = [&, first = 1000 * number](int64_t i) {
        return static_cast<float>(value_at(previous, first + i));
      };
      EXPECT_EQ(wrong_bits<float>(tensor, expected), 0)
          << count << " elements, tag " << tag << ", message " << number;
    }
    for (CommRequest& request : requests) request.wait();
    requests.front().wait();
  }
}

void messages_do_not_meet_collectives(const Group& world) {
  Context context(contract_device);
  const int next = (world.rank() + 1) % world.size();
  const int previous = (world.rank() + world.size() - 1) % world.size();
  CommRequest request = world.send(context, make<double>(context, world.rank(), 100), next, 0);
  const Tensor sum = make<double>(context, world.rank(), 100);
  world.all_reduce(context, sum, ReduceOp::sum);
  world.barrier();
  const Tensor received = make<double>(context, 99, 100);
  world.receive(context, received, previous, 0);
  request.wait();
  EXPECT_EQ(wrong_bits<double>(sum, [&](int64_t i) { return expected_sum<double>(world.size(), i); }), 0);
  EXPECT_EQ(wrong_bits<double>(received, [&](int64_t i) { return value_at(previous, i); }), 0);
}

// Many under way together, in two groups, waited for in another order than started, with calls that wait and
// messages between: each has the bits of the call that waits.
void started_collectives_run_side_by_side(const Group& world) {
  Context context(contract_device);
  const Group copy_of_world = world.split({0, world.rank()}, "copy");
  const int ranks = world.size();
  const int next = (world.rank() + 1) % ranks;
  const int previous = (world.rank() + ranks - 1) % ranks;
  for (const int64_t count : kCounts) {
    std::vector<int64_t> counts;
    for (int r = 0; r < ranks; ++r) counts.push_back(even_part(count, ranks, r).size());
    const Range mine = even_part(count, ranks, world.rank());
    const auto sum = [&](int64_t i) { return expected_sum<float>(ranks, i); };

    const Tensor message = make<float>(context, 99, count);
    const Tensor reduced = make<float>(context, world.rank(), count);
    const Tensor scattered = make<float>(context, world.rank(), count);
    const Tensor gathered = make<float>(context, world.rank(), count);
    const Tensor elsewhere = make<float>(context, world.rank(), count);
    const Tensor at_once = make<float>(context, world.rank(), count);
    std::vector<CommRequest> started;
    started.push_back(world.send(context, make<float>(context, world.rank(), count), next, 2));
    if (ranks > 1) started.push_back(world.start_receive(context, message, previous, 2));
    started.push_back(world.start_all_reduce_sum(context, reduced));
    started.push_back(
        world.start_reduce_scatter_sum(context, scattered, scattered.flat(mine.begin, mine.size()), counts));
    started.push_back(copy_of_world.start_all_reduce_sum(context, elsewhere));
    world.all_reduce(context, at_once, ReduceOp::sum);
    EXPECT_EQ(wrong_bits<float>(at_once, sum), 0);
    started.push_back(
        world.start_all_gather(context, gathered.flat(mine.begin, mine.size()), gathered, counts));
    std::vector<double> numbers;
    started.push_back(world.start_gather(
        context, std::vector<double>{value_at(world.rank(), 1), value_at(world.rank(), 2)}, numbers));
    world.barrier();
    if (ranks == 1) world.receive(context, message, previous, 2);
    for (size_t i = started.size(); i-- > 0;) started[i].wait();

    EXPECT_EQ(wrong_bits<float>(reduced, sum), 0) << count;
    EXPECT_EQ(wrong_bits<float>(elsewhere, sum), 0) << count;
    EXPECT_EQ(wrong_bits<float>(scattered.flat(mine.begin, mine.size()),
                                [&](int64_t i) { return sum(mine.begin + i); }),
              0)
        << count;
    const auto whose = [&](int64_t i) {
      int r = 0;
      while (!even_part(count, ranks, r).contains(i)) ++r;
      return static_cast<float>(value_at(r, i));
    };
    EXPECT_EQ(wrong_bits<float>(gathered, whose), 0) << count;
    EXPECT_EQ(
        wrong_bits<float>(message, [&](int64_t i) { return static_cast<float>(value_at(previous, i)); }), 0)
        << count;
    std::vector<double> expected;
    for (int r = 0; r < ranks; ++r) expected.insert(expected.end(), {value_at(r, 1), value_at(r, 2)});
    EXPECT_EQ(numbers, expected);
  }
}

// More than may be under way together.
void very_many_may_be_started(const Group& world) {
  Context context(contract_device);
  const auto rank = static_cast<double>(world.rank());
  std::vector<Tensor> tensors;
  std::vector<CommRequest> started;
  for (int i = 0; i < 1000; ++i) {
    const double value[] = {rank + i};
    tensors.push_back(from_host<double>(context, value, {1}));
    started.push_back(world.start_all_reduce_sum(context, tensors.back()));
  }
  started.clear();
  const double ranks = world.size();
  for (int i = 0; i < 1000; ++i)
    EXPECT_EQ(to_host(tensors[static_cast<size_t>(i)])[0], ranks * (ranks - 1) / 2 + ranks * i);
}

void host_numbers(const Group& world) {
  double expected = value_at(0, 3);
  double most = value_at(0, 3);
  for (int r = 1; r < world.size(); ++r) {
    expected += value_at(r, 3);
    most = std::max(most, value_at(r, 3));
  }
  EXPECT_EQ(world.all_reduce(value_at(world.rank(), 3), ReduceOp::sum), expected);
  EXPECT_EQ(world.all_reduce(value_at(world.rank(), 3), ReduceOp::max), most);
  // 2^53 + 1 has no double.
  EXPECT_EQ(world.all_reduce_sum(world.rank() == 0 ? (int64_t{1} << 53) + 1 : 0), (int64_t{1} << 53) + 1);
  if (world.size() > 1) {
    EXPECT_THROW(world.all_reduce_sum(std::numeric_limits<int64_t>::max()), LogicError);
  }
}

void texts(const Group& world) {
  const auto text = [](int rank) {
    return std::string(static_cast<size_t>(rank) * 1000, 'a') + std::to_string(rank);
  };
  const std::vector<std::string> all = world.all_gather_text(text(world.rank()));
  EXPECT_EQ(static_cast<int>(all.size()), world.size());
  for (size_t r = 0; r < all.size(); ++r) EXPECT_EQ(all[r], text(static_cast<int>(r)));
  EXPECT_EQ(world.all_gather_text(""), std::vector<std::string>(static_cast<size_t>(world.size())));
}

// The sum of world ranks over a group, through the group itself.
double sum_of_world_ranks(const Group& group, int world_rank) {
  Context context(contract_device);
  const Tensor tensor = from_host<double>(context, std::vector<double>{1.0 * world_rank}, {1});
  group.all_reduce(context, tensor, ReduceOp::sum);
  return to_host(tensor)[0];
}

void check_group(const Group& group, const std::string& name, const std::vector<int>& members,
                 int world_rank) {
  EXPECT_TRUE(group.defined());
  EXPECT_EQ(group.name(), name);
  EXPECT_EQ(group.world_ranks(), members);
  EXPECT_EQ(group.size(), static_cast<int>(members.size()));
  EXPECT_EQ(group.world_ranks()[static_cast<size_t>(group.rank())], world_rank);
  EXPECT_EQ(sum_of_world_ranks(group, world_rank), std::accumulate(members.begin(), members.end(), 0));
  group.barrier();
}

// Ranks of `world` with the parity of this one, the last first.
std::vector<int> same_parity_backwards(const Group& world) {
  std::vector<int> members;
  for (int r = world.size() - 1; r >= 0; --r) {
    if (r % 2 == world.rank() % 2) members.push_back(r);
  }
  return members;
}

void split(const Group& world) {
  const std::vector<int> members = same_parity_backwards(world);
  const Group chosen = world.split({world.rank() % 2, -world.rank()}, "parity");
  check_group(chosen, "parity", members, world.rank());
  const Group known = world.split_by([](int r) { return SplitChoice{r % 2, -r}; }, "known");
  check_group(known, "known", members, world.rank());

  const Group alone = chosen.split_by([](int r) { return SplitChoice{r, 0}; }, "alone");
  check_group(alone, "alone", {world.rank()}, world.rank());

  std::vector<int> everyone(static_cast<size_t>(world.size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  check_group(world.split({7, 0}, "ties"), "ties", everyone, world.rank());
}

void split_leaves_out(const Group& world) {
  const Group first = world.split({world.rank() == 0 ? 0 : -1, 0}, "first");
  EXPECT_EQ(first.defined(), world.rank() == 0);
  const Group last = world.split_by(
      [&](int r) {
        return SplitChoice{r == world.size() - 1 ? 3 : -1, 0};
      },
      "last");
  EXPECT_EQ(last.defined(), world.rank() == world.size() - 1);
  world.barrier();
}

void split_by_finds_disagreement(const Group& world) {
  if (world.size() == 1) return;
  const auto choose = [&](int r) { return SplitChoice{0, world.rank() == 1 ? -r : r}; };
  EXPECT_THROW(world.split_by(choose, "torn"), LogicError);
  world.barrier();
}

void groups_work_side_by_side(const Group& world) {
  const Group parity = world.split({world.rank() % 2, world.rank()}, "parity");
  const Group copy_of_world = world.split({0, world.rank()}, "copy");
  int members = 0;
  for (int r = world.rank() % 2; r < world.size(); r += 2) members += r;
  for (int round = 0; round < 50; ++round) {
    EXPECT_EQ(sum_of_world_ranks(parity, world.rank()), members);
    EXPECT_EQ(sum_of_world_ranks(copy_of_world, world.rank()), world.size() * (world.size() - 1) / 2);
    EXPECT_EQ(sum_of_world_ranks(world, world.rank()), world.size() * (world.size() - 1) / 2);
  }
}

void mistakes_are_found_before_moving(const Group& world) {
  Context context(contract_device);
  const Tensor tensor = context.zeros({4}, DType::f32);
  const Tensor integers = context.zeros({4}, DType::i32);
  const std::vector<int64_t> counts(static_cast<size_t>(world.size()), 3);
  EXPECT_THROW(world.all_reduce(context, Tensor(), ReduceOp::sum), LogicError);
  EXPECT_THROW(world.all_reduce(context, integers, ReduceOp::sum), LogicError);
  EXPECT_THROW(world.all_reduce(context, context.zeros({4}, DType::bf16), ReduceOp::max), LogicError);
  EXPECT_THROW(world.all_reduce(context, context.zeros({4}, DType::f16), ReduceOp::max), LogicError);
  EXPECT_THROW(world.all_gather(context, tensor.flat(0, 3), tensor.flat(0, 2), counts), LogicError);
  EXPECT_THROW(
      world.reduce_scatter_sum(context, context.zeros({3 * world.size()}, DType::f32), tensor, counts),
      LogicError);
  EXPECT_THROW(world.broadcast(context, tensor, world.size()), LogicError);
  EXPECT_THROW(static_cast<void>(world.send(context, tensor, -1, 0)), LogicError);
  EXPECT_THROW(world.receive(context, tensor, 0, Group::kMaxTag + 1), LogicError);
  Context meta(DeviceKind::meta);
  EXPECT_THROW(world.all_reduce(meta, tensor, ReduceOp::sum), LogicError);
  world.barrier();
}

void the_ledger_counts_payloads(const Group& world) {
  Context context(contract_device);
  const Group group = world.split({0, 0}, "counted");
  world.ledger().clear();
  group.all_reduce(context, context.zeros({100}, DType::f32), ReduceOp::sum);
  const std::vector<Tensor> two = {context.zeros({10}, DType::bf16), context.zeros({3}, DType::f64)};
  group.all_reduce_sum(context, two);
  group.broadcast(context, context.zeros({7}, DType::u8), 0);
  using ::testing::ElementsAre;
  using ::testing::IsEmpty;
  if (world.size() == 1) {
    EXPECT_THAT(world.ledger().records(), IsEmpty());
  } else {
    EXPECT_THAT(world.ledger().records(), ElementsAre(TrafficRecord{"counted", "all_reduce", 2, 400 + 44},
                                                      TrafficRecord{"counted", "broadcast", 1, 7}));
  }
  EXPECT_THAT(world.ledger().events(), IsEmpty());
}

void run_every_call(const Group& world, Context& context) {
  const auto ranks = static_cast<size_t>(world.size());
  const Tensor big = context.zeros({40007}, DType::f32);
  const Tensor small = context.zeros({3}, DType::bf16);
  world.all_reduce(context, big, ReduceOp::sum);
  world.all_reduce(context, small, ReduceOp::sum);
  world.all_reduce(context, big, ReduceOp::max);
  const std::vector<Tensor> both = {big, small};
  world.all_reduce_sum(context, both);

  std::vector<int64_t> counts(ranks);
  for (size_t r = 0; r < ranks; ++r)
    counts[r] = even_part(40007, world.size(), static_cast<int64_t>(r)).size();
  const Range mine = even_part(40007, world.size(), world.rank());
  world.reduce_scatter_sum(context, big, big.flat(mine.begin, mine.size()), counts);
  world.all_gather(context, big.flat(mine.begin, mine.size()), big, counts);
  world.broadcast(context, small, world.size() - 1);
  {
    std::vector<double> numbers;
    CommRequest gather = world.start_all_gather(context, big.flat(mine.begin, mine.size()), big, counts);
    gather.wait();
    CommRequest reduce = world.start_all_reduce_sum(context, big);
    CommRequest control = world.start_gather(context, std::vector<double>{1.0, 2.0}, numbers);
    reduce.wait();
    CommRequest scatter =
        world.start_reduce_scatter_sum(context, big, big.flat(mine.begin, mine.size()), counts);
  }

  const Group backwards = world.split_by([](int r) { return SplitChoice{0, -r}; }, "backwards");
  const Group pair = world.split_by([](int r) { return SplitChoice{r / 2, r}; }, "pair");
  CommRequest request = backwards.send(context, small, (backwards.rank() + 1) % backwards.size(), 4);
  backwards.receive(context, context.zeros({3}, DType::bf16),
                    (backwards.rank() + backwards.size() - 1) % backwards.size(), 4);
  request.wait();
  pair.all_reduce(context, small, ReduceOp::sum);
  pair.barrier();
  world.all_gather_text("twelve bytes");
  world.all_reduce(1.0, ReduceOp::sum);
  world.all_reduce_sum(int64_t{1});
}

void every_call_again_and_again(const Group& world) {
  Context context(contract_device);
  for (int round = 0; round < 5; ++round) run_every_call(world, context);
}

// Starts are numbered from the first that these accounts know of.
std::string describe(const TrafficEvent& event, int64_t starts_before) {
  return fmt::format("{} [{}] {} {} {} {} {}", event.group->name, fmt::join(event.group->world_ranks, " "),
                     event.kind, event.bytes, event.peer, event.tag,
                     event.start > 0 ? event.start - starts_before : 0);
}

void meta_accounts_alike(const Group& world) {
  const Accounts real = account(world, DeviceKind::cpu);
  EXPECT_FALSE(real.events.empty());
  expect_same(account(make_meta_world(world.rank(), world.size()), DeviceKind::meta), real);
}

}  // namespace

Accounts account(const Group& world, DeviceKind device) {
  Context context(device);
  world.ledger().clear();
  world.ledger().keep_events(true);
  const int64_t starts_before = world.ledger().number_start();
  run_every_call(world, context);
  world.ledger().keep_events(false);
  Accounts accounts;
  accounts.records = world.ledger().records();
  for (const TrafficEvent& event : world.ledger().events())
    accounts.events.push_back(describe(event, starts_before));
  for (const auto& [name, cost] : context.costs().operations()) {
    accounts.costs.push_back(fmt::format("{} {} {} {}", name, cost.calls, cost.flops, cost.bytes));
  }
  accounts.memory = context.memory().report();
  return accounts;
}

void expect_same(const Accounts& meta, const Accounts& real) {
  EXPECT_EQ(meta.records, real.records);
  EXPECT_EQ(meta.events, real.events);
  EXPECT_EQ(meta.costs, real.costs);
  EXPECT_EQ(meta.memory.peak_live, real.memory.peak_live);
  EXPECT_EQ(meta.memory.peak_reserved, real.memory.peak_reserved);
  EXPECT_EQ(meta.memory.at_peak_by_use, real.memory.at_peak_by_use);
}

ContractOnGpu::ContractOnGpu() { contract_device = DeviceKind::cuda; }
ContractOnGpu::~ContractOnGpu() { contract_device = DeviceKind::cpu; }

const std::vector<ContractCase>& comm_contract() {
  static const std::vector<ContractCase> cases = {
      {"AllReduceSumF64", all_reduce_sum<double>},
      {"AllReduceSumF32", all_reduce_sum<float>},
      {"AllReduceSumBf16", all_reduce_sum<bf16>},
      {"AllReduceSumF16", all_reduce_sum<f16>},
      {"AllReduceMaxF64", all_reduce_max<double>},
      {"AllReduceMaxF32", all_reduce_max<float>},
      {"ANanWinsTheMaximum", a_nan_wins_the_maximum},
      {"FusedAllReduce", fused_all_reduce},
      {"ReduceScatterF64", reduce_scatter<double>},
      {"ReduceScatterF32", reduce_scatter<float>},
      {"ReduceScatterBf16", reduce_scatter<bf16>},
      {"ReduceScatterF16", reduce_scatter<f16>},
      {"AllGatherF32", all_gather<float>},
      {"AllGatherBf16", all_gather<bf16>},
      {"AllGatherOfIntegers", all_gather_of_integers},
      {"RowsTogether", rows_together},
      {"Broadcast", broadcast},
      {"MessagesKeepOrderAndTags", messages_keep_order_and_tags},
      {"MessagesDoNotMeetCollectives", messages_do_not_meet_collectives},
      {"StartedCollectivesRunSideBySide", started_collectives_run_side_by_side},
      {"VeryManyMayBeStarted", very_many_may_be_started},
      {"HostNumbers", host_numbers},
      {"Texts", texts},
      {"Split", split},
      {"SplitLeavesOut", split_leaves_out},
      {"SplitByFindsDisagreement", split_by_finds_disagreement},
      {"GroupsWorkSideBySide", groups_work_side_by_side},
      {"MistakesAreFoundBeforeMoving", mistakes_are_found_before_moving},
      {"TheLedgerCountsPayloads", the_ledger_counts_payloads},
      {"EveryCallAgainAndAgain", every_call_again_and_again},
      {"MetaAccountsAlike", meta_accounts_alike},
  };
  return cases;
}

}  // namespace normformer::testing
