#include "normformer/context_parallel/ring_attention.h"

#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/mesh/layout.h"
#include "normformer/ops/partial_attention.h"
#include "normformer/ops/random_fill.h"

namespace normformer {
namespace {

struct Case {
  ops::AttentionShape shape;
  bool documents = false;
  double dropout = 0.0;

  int64_t channels() const { return shape.heads * shape.head_size; }
};

std::string describe(const Case& c, int ranks) {
  return ops::to_string(c.shape) + (c.documents ? ", documents" : "") + " dropout " +
         std::to_string(c.dropout) + " on " + std::to_string(ranks);
}

ops::Dropout dropout_of(const Case& c) {
  return {.probability = c.dropout, .stream = RandomStream{}.with(5), .first_sample = 3};
}

// Documents of 5 tokens, the first of a sequence shorter the later the sequence.
std::vector<int32_t> starts_of(const Case& c, const SequencePart& part) {
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < c.shape.batch; ++b) {
    for (int64_t row = 0; row < part.size(); ++row) {
      const int64_t position = part.position_of(row);
      starts.push_back(static_cast<int32_t>(std::max<int64_t>(0, position - (position + b) % 5)));
    }
  }
  return starts;
}

// Rows of `part` of every sequence, of a drawn matrix [batch * length, columns].
Tensor drawn_rows(Context& context, const Case& c, int64_t columns, const SequencePart& part, DType dtype,
                  uint64_t what) {
  const int64_t length = c.shape.length;
  const Rectangle all{{0, c.shape.batch * length}, {0, columns}, c.shape.batch * length, columns};
  const Tensor whole = context.empty({c.shape.batch * length, columns}, accumulator_of(dtype));
  ops::fill_normal(context, whole, all, RandomStream{what}, 1.0);
  const Tensor rows = context.empty({c.shape.batch * part.size(), columns}, dtype);
  for (int64_t row = 0; row < rows.dim(0); ++row) {
    const int64_t from = row / part.size() * length + part.position_of(row % part.size());
    copy(context, whole.rows(from, from + 1), rows.rows(row, row + 1));
  }
  return rows;
}

// One rank's arguments and results.
struct Attention {
  Attention(Context& context, const Case& c, const SequencePart& held, DType dtype)
      : part(held),
        qkv(drawn_rows(context, c, 3 * c.channels(), part, dtype, 1)),
        dout(drawn_rows(context, c, c.channels(), part, dtype, 2)),
        out(context.empty(dout.shape(), dtype)),
        lse(context.empty({c.shape.batch, c.shape.heads, part.size()}, accumulator_of(dtype))),
        dqkv(context.empty(qkv.shape(), dtype)) {
    if (c.documents) starts = from_host<int32_t>(context, starts_of(c, part), {qkv.dim(0)});
  }

  SequencePart part;
  Tensor qkv, dout, starts, out, lse, dqkv;
};

// Results of the whole sequences, rows in the order of tokens.
struct Outcome {
  explicit Outcome(const Case& c)
      : out(static_cast<size_t>(c.shape.batch * c.shape.length * c.channels())), dqkv(3 * out.size()) {}

  void put(const Case& c, const Attention& from) {
    put_rows(c, from.part, to_host(from.out), c.channels(), out);
    put_rows(c, from.part, to_host(from.dqkv), 3 * c.channels(), dqkv);
  }

  std::vector<double> out, dqkv;

 private:
  static void put_rows(const Case& c, const SequencePart& part, const std::vector<double>& rows,
                       int64_t columns, std::vector<double>& whole) {
    for (int64_t row = 0; row < c.shape.batch * part.size(); ++row) {
      const int64_t to = row / part.size() * c.shape.length + part.position_of(row % part.size());
      std::copy_n(rows.begin() + row * columns, columns, whole.begin() + to * columns);
    }
  }
};

Outcome outcome_of(const Case& c, int ranks, DType dtype) {
  Outcome outcome(c);
  std::mutex mutex;
  run_local_world(ranks, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const RingAttention ring(context, world);
    Attention mine(context, c, ring.part(c.shape.length), dtype);
    ring.forward(c.shape, mine.qkv, mine.starts, dropout_of(c), mine.out, mine.lse);
    ring.backward(c.shape, mine.dout, mine.qkv, mine.starts, dropout_of(c), mine.out, mine.lse, mine.dqkv);
    const std::lock_guard lock(mutex);
    if (mine.qkv.numel() > 0) outcome.put(c, mine);
  });
  return outcome;
}

Outcome attention_of(const Case& c, DType dtype) {
  Context context(DeviceKind::cpu);
  Attention all(context, c, SequencePart::whole(c.shape.length), dtype);
  ops::attention_forward(context, c.shape, all.qkv, all.starts, dropout_of(c), all.out, all.lse);
  ops::attention_backward(context, c.shape, all.dout, all.qkv, all.starts, dropout_of(c), all.out, all.lse,
                          all.dqkv);
  Outcome outcome(c);
  outcome.put(c, all);
  return outcome;
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance) {
  double largest = 0.0;
  for (const double w : want) largest = std::max(largest, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(got[i], want[i], tolerance * largest) << "element " << i;
}

// Lengths that nothing divides, and fewer tokens than chunks.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const ops::AttentionShape& shape :
       {ops::AttentionShape{.batch = 2, .length = 53, .heads = 3, .head_size = 5, .first_head = 2},
        ops::AttentionShape{.batch = 1, .length = 3, .heads = 1, .head_size = 4},
        ops::AttentionShape{.batch = 2, .length = 200, .heads = 1, .head_size = 8}}) {
    all.push_back({shape});
    all.push_back({shape, true});
    all.push_back({shape, true, 0.3});
    ops::AttentionShape bidirectional = shape;
    bidirectional.causal = false;
    all.push_back({bidirectional});
    all.push_back({bidirectional, true, 0.3});
  }
  return all;
}

TEST(RingAttention, IsAttentionToTheWholeSequence) {
  const std::map<DType, double> tolerances{
      {DType::f64, 1e-13}, {DType::f32, 2e-6}, {DType::bf16, 0x1p-6}, {DType::f16, 0x1p-9}};
  for (const auto& [dtype, tolerance] : tolerances) {
    for (const Case& c : cases()) {
      const Outcome want = attention_of(c, dtype);
      for (const int ranks : {1, 2, 3, 4}) {
        SCOPED_TRACE(describe(c, ranks) + " in " + std::string(name_of(dtype)));
        const Outcome got = outcome_of(c, ranks, dtype);
        expect_close(got.out, want.out, tolerance);
        expect_close(got.dqkv, want.dqkv, tolerance);
      }
    }
  }
}

TEST(RingAttention, TheSameBitsEveryTime) {
  const Case c{{.batch = 2, .length = 53, .heads = 3, .head_size = 5}, true, 0.3};
  const Outcome first = outcome_of(c, 3, DType::bf16);
  for (int i = 0; i < 5; ++i) {
    const Outcome again = outcome_of(c, 3, DType::bf16);
    EXPECT_EQ(again.out, first.out);
    EXPECT_EQ(again.dqkv, first.dqkv);
  }
}

// One rank's costs and traffic on meta.
struct Account {
  OperationCost forward, backward;
  std::map<std::string, int64_t> sent, received;
};

Account account_of(const Case& c, int rank, int ranks, DType dtype) {
  const Group world = make_meta_world(rank, ranks);
  Context context(DeviceKind::meta);
  const RingAttention ring(context, world);
  const int64_t rows = c.shape.batch * ring.part(c.shape.length).size();
  const Tensor qkv = context.empty({rows, 3 * c.channels()}, dtype);
  const Tensor out = context.empty({rows, c.channels()}, dtype);
  const Tensor lse =
      context.empty({c.shape.batch, c.shape.heads, ring.part(c.shape.length).size()}, accumulator_of(dtype));
  Account account;
  const auto enter = [&](const char* direction) {
    for (const TrafficRecord& r : world.ledger().records()) {
      if (r.kind == "send") account.sent[direction] = r.bytes;
      if (r.kind == "receive") account.received[direction] = r.bytes;
    }
    world.ledger().clear();
  };
  ring.forward(c.shape, qkv, {}, dropout_of(c), out, lse);
  enter("forward");
  ring.backward(c.shape, out, qkv, {}, dropout_of(c), out, lse, qkv);
  enter("backward");
  account.forward = context.costs().operations().at("partial_attention_forward");
  account.backward = context.costs().operations().at("partial_attention_backward");
  return account;
}

// Of n tokens with c channels a rank sends and receives (ranks - 1) blocks of keys and values forward; as
// many backward, and as many of their gradients in the accumulator type.
TEST(RingAttention, TrafficAndWorkAreTheSameForEveryRank) {
  const Case c{{.batch = 3, .length = 48, .heads = 2, .head_size = 8}};
  for (const auto& [dtype, bytes] : std::map<DType, int64_t>{{DType::bf16, 2}, {DType::f64, 8}}) {
    const int64_t accumulator_bytes = size_of(accumulator_of(dtype));
    for (const int ranks : {2, 3, 4}) {
      const int64_t block = 3 * 48 / ranks * 2 * 16;  // elements
      for (int rank = 0; rank < ranks; ++rank) {
        const Account account = account_of(c, rank, ranks, dtype);
        for (const auto* moved : {&account.sent, &account.received}) {
          EXPECT_EQ(moved->at("forward"), (ranks - 1) * block * bytes);
          EXPECT_EQ(moved->at("backward"), (ranks - 1) * block * (bytes + accumulator_bytes));
        }
        EXPECT_EQ(account.forward.calls, ranks);
        EXPECT_EQ(account.forward.flops * ranks, ops::attention_forward_flops(c.shape));
        EXPECT_EQ(account.backward.flops, account.forward.flops / 2 * 5);
      }
    }
  }
}

// Not only together: each step is the same work, so that no rank waits for another.
TEST(RingAttention, EveryStepIsTheSameWorkForEveryRank) {
  constexpr int64_t kRanks = 4;
  constexpr int64_t kChunk = 16;
  for (int64_t rank = 0; rank < kRanks; ++rank) {
    for (int64_t other = 0; other < kRanks; ++other) {
      const ops::PartialAttentionShape shape{.length = 2 * kRanks * kChunk,
                                             .queries = context_part(2 * kRanks * kChunk, kRanks, rank),
                                             .keys = context_part(2 * kRanks * kChunk, kRanks, other)};
      const int64_t pairs = rank == other ? kChunk * (kChunk + 1) + kChunk * kChunk : 2 * kChunk * kChunk;
      EXPECT_EQ(ops::partial_attention_forward_flops(shape), 4 * pairs);
    }
  }
}

}  // namespace
}  // namespace normformer
