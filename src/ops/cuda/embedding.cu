#include <algorithm>
#include <utility>

#include "normformer/ops/embedding.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cuda/dropout_mask.h"
#include "ops/kernels.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarp;
constexpr int64_t kMostBlocks = 132 * 8;  // as many as a GPU holds at once

/// Kernels that share items in a loop, one thread or one warp an item.
LaunchShape thread_each(int64_t items) {
  return {.blocks = std::min(ceil_div(items, int64_t{kThreads}), kMostBlocks), .threads = kThreads};
}
LaunchShape warp_each(int64_t items) {
  return {.blocks = std::min(ceil_div(items, kWarps), kMostBlocks), .threads = kThreads};
}

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int64_t global_warp() { return global_thread() / kWarp; }
__device__ inline int64_t global_warps() { return global_threads() / kWarp; }

/// out[n] = the table's row of token n, moved N elements at a time: one warp a row.
template <int N, class T>
__global__ void gather_kernel(const int32_t* tokens, int64_t count, const Pack<T, N>* table, int64_t rows,
                              int64_t packs, int64_t first_row, Pack<T, N>* out) {
  for (int64_t n = global_warp(); n < count; n += global_warps()) {
    const int32_t id = tokens[n];
    const int64_t row = id - first_row;
    const bool here = row >= 0 && row < rows;
    for (int64_t p = lane_index(); p < packs; p += kWarp) {
      out[n * packs + p] = here ? table[row * packs + p] : Pack<T, N>{};
    }
  }
}

// The backward sorts tokens by their rows, stably, so that what is added to a row lies together and in the
// order of tokens. Each run of equal rows is cut into segments of kSegment tokens. One warp adds a segment:
// the first onto the gradient, others into a partial sum of their own; then the partial sums are added onto
// the gradient in order.

/// A token to be sorted: its row in the upper half, its position in the lower. Tokens that another rank holds
/// have the row after the last.
using Entry = int64_t;

__device__ inline Entry make_entry(int64_t row, int64_t position) { return row << 32 | position; }
__device__ inline int64_t row_of(Entry entry) { return entry >> 32; }
__device__ inline int32_t position_of(Entry entry) { return static_cast<int32_t>(entry & 0x7FFFFFFF); }

__global__ void list_kernel(const int32_t* tokens, int64_t count, int64_t first_row, int64_t rows,
                            Entry* entries) {
  for (int64_t n = global_thread(); n < count; n += global_threads()) {
    const int32_t id = tokens[n];
    const int64_t row = id - first_row;
    entries[n] = make_entry(row >= 0 && row < rows ? row : rows, n);
  }
}

// A radix sort: for every digit of the row, from the lowest, entries are counted by part and digit, the
// counts are summed up to places, and each warp moves its part's entries in their order.
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kPart = 1024;  // entries of one warp
constexpr int kSortWarps = 4;    // of a block

/// What a sort's kernels read. The counts, [kDigits, parts], are exclusive sums once scanned.
struct Digits {
  const Entry* entries;
  int64_t count;
  int shift;
  int64_t parts;
  int32_t* counts;
};

/// Calls body(entry, digit, peers, in range) on every lane for each 32 entries of a part; peers are the lanes
/// that have the same digit.
template <class Body>
__device__ void for_digits(const Digits& sort, int64_t part, Body&& body) {
  const int64_t end = (part + 1) * kPart < sort.count ? (part + 1) * kPart : sort.count;
  for (int64_t first = part * kPart; first < end; first += kWarp) {
    const int64_t i = first + lane_index();
    const bool in_range = i < end;
    const Entry entry = in_range ? sort.entries[i] : 0;
    const int digit = static_cast<int>(entry >> sort.shift) & (kDigits - 1);
    unsigned peers = __ballot_sync(kAllLanes, in_range);
#pragma unroll
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const bool set = (digit >> bit & 1) != 0;
      const unsigned lanes = __ballot_sync(kAllLanes, set);
      peers &= set ? lanes : ~lanes;
    }
    body(entry, digit, peers, in_range);
  }
}

/// Adds the lanes of each digit to the warp's sums of digits, in which every lane has read before.
__device__ inline void add_peers(int32_t* sums, int digit, unsigned peers, bool in_range) {
  __syncwarp();
  if (in_range && lane_index() == __ffs(static_cast<int>(peers)) - 1) sums[digit] += __popc(peers);
  __syncwarp();
}

__global__ void count_kernel(Digits sort) {
  __shared__ int32_t of_warps[kSortWarps][kDigits];
  const int64_t part = global_warp();
  if (part >= sort.parts) return;
  int32_t* sums = of_warps[threadIdx.x / kWarp];
  for (int d = lane_index(); d < kDigits; d += kWarp) sums[d] = 0;
  for_digits(sort, part, [&](Entry, int digit, unsigned peers, bool in_range) {
    add_peers(sums, digit, peers, in_range);
  });
  for (int d = lane_index(); d < kDigits; d += kWarp) sort.counts[d * sort.parts + part] = sums[d];
}

__global__ void move_kernel(Digits sort, Entry* sorted) {
  __shared__ int32_t of_warps[kSortWarps][kDigits];
  const int64_t part = global_warp();
  if (part >= sort.parts) return;
  int32_t* places = of_warps[threadIdx.x / kWarp];
  for (int d = lane_index(); d < kDigits; d += kWarp) places[d] = sort.counts[d * sort.parts + part];
  __syncwarp();
  for_digits(sort, part, [&](Entry entry, int digit, unsigned peers, bool in_range) {
    const unsigned earlier = peers & ((1u << lane_index()) - 1);
    if (in_range) sorted[places[digit] + __popc(earlier)] = entry;
    add_peers(places, digit, peers, in_range);
  });
}

constexpr int kScanThreads = 1024;
constexpr int kScanItems = 8;  // of a thread, in one round

/// The sum of the threads' values before this one's, and of all.
struct Sums {
  int32_t before;
  int32_t all;
};

__device__ inline Sums sum_before(int32_t value) {
  __shared__ int32_t of_warps[kScanThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t up_to = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, up_to, static_cast<unsigned>(distance));
    if (lane_index() >= distance) up_to += other;
  }
  __syncthreads();  // of_warps of an earlier call has been read
  if (lane_index() == kWarp - 1) of_warps[warp] = up_to;
  __syncthreads();
  Sums sums{up_to - value, 0};
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w < warp) sums.before += of_warps[w];
    sums.all += of_warps[w];
  }
  return sums;
}

/// values[i] becomes the sum of those before it, values[count] that of all. One block.
__global__ void scan_kernel(int32_t* values, int64_t count) {
  int32_t before = 0;
  for (int64_t first = 0; first < count; first += kScanThreads * kScanItems) {
    const int64_t begin = first + threadIdx.x * kScanItems;
    int32_t items[kScanItems];
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      items[i] = begin + i < count ? values[begin + i] : 0;
      sum += items[i];
    }
    const Sums sums = sum_before(sum);
    int32_t next = before + sums.before;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      if (begin + i < count) values[begin + i] = next;
      next += items[i];
    }
    before += sums.all;
  }
  if (threadIdx.x == 0) values[count] = before;
}

void scan(Context& context, const Tensor& values) {
  launch(context, {.blocks = 1, .threads = kScanThreads}, scan_kernel, values.data<int32_t>(),
         values.numel() - 1);
}

/// `entries`, of rows up to `most`, sorted by rows; those of one row keep their order. Overwrites them.
Tensor sort_by_row(Context& context, Tensor entries, int64_t most) {
  const int64_t count = entries.numel();
  const int64_t parts = ceil_div(count, kPart);
  const Tensor counts = context.empty({kDigits * parts + 1}, DType::i32, MemoryUse::workspace);
  Tensor sorted = context.empty({count}, DType::i64, MemoryUse::workspace);
  const LaunchShape shape{.blocks = ceil_div(parts, int64_t{kSortWarps}), .threads = kSortWarps * kWarp};
  for (int bit = 0; most >> bit > 0; bit += kDigitBits) {
    const Digits sort{entries.data<Entry>(), count, 32 + bit, parts, counts.data<int32_t>()};
    launch(context, shape, count_kernel, sort);
    scan(context, counts);
    launch(context, shape, move_kernel, sort, sorted.data<Entry>());
    std::swap(entries, sorted);
  }
  return entries;
}

constexpr int64_t kSegment = 64;  // a segment's rows are added one after the other

/// The first of sorted entries [low, high) whose row is `row` or more; `high` where there is none.
__device__ inline int64_t first_of_row(const Entry* sorted, int64_t low, int64_t high, int64_t row) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (row_of(sorted[middle]) < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// is_start[i] = 1 where a segment begins at sorted entry i, else 0.
__global__ void mark_kernel(const Entry* sorted, int64_t count, int32_t* is_start) {
  for (int64_t i = global_thread(); i < count; i += global_threads()) {
    const int64_t run = first_of_row(sorted, 0, i, row_of(sorted[i]));
    is_start[i] = (i - run) % kSegment == 0 ? 1 : 0;
  }
}

/// segments[s] = where segment s begins, and where the last one ends, from the scanned marks.
__global__ void segments_kernel(const int32_t* starts, int64_t count, int32_t* segments) {
  for (int64_t i = global_thread(); i <= count; i += global_threads()) {
    if (i == count || starts[i + 1] != starts[i]) segments[starts[i]] = static_cast<int32_t>(i);
  }
}

/// Tokens sorted by rows and cut into segments.
struct Segments {
  const Entry* sorted;
  int64_t count;  ///< of entries
  int64_t rows;   ///< of this rank; entries of that row or more are not added
  const int32_t* starts;
  const int32_t* segments;
};

/// sums[c + i] += factor * the rows of dout at entries [begin, end), in order. All lanes call with one range;
/// those whose columns are beyond the width read nothing.
template <int N, class T, class A>
__device__ void add_rows(const Entry* sorted, int64_t begin, int64_t end, const T* dout, int64_t width,
                         int64_t c, A factor, A (&sums)[N]) {
  constexpr int kAhead = 4;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int count = static_cast<int>(end - first < kWarp ? end - first : kWarp);
    const int32_t position = lane_index() < count ? position_of(sorted[first + lane_index()]) : 0;
    for (int i = 0; i < count; i += kAhead) {
      A x[kAhead][N] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t row = __shfl_sync(kAllLanes, position, i + a);
        if (i + a < count && c < width) load_pack<N>(dout + row * width + c, x[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] = i + a < count ? sums[j] + factor * x[a][j] : sums[j];
      }
    }
  }
}

/// Adds every segment: one warp a segment and 32 N columns of it. A partial sum's row is that of its place in
/// partials [ceil(count / kSegment), width]: no two segments that are not their run's first begin within the
/// same kSegment entries.
template <int N, class T>
__global__ void add_segments_kernel(Segments cut, const T* dout, int64_t width, Accumulator<T> factor,
                                    Accumulator<T>* dweight, Accumulator<T>* partials) {
  using A = Accumulator<T>;
  const int64_t chunks = ceil_div(width, int64_t{kWarp} * N);
  const int64_t items = cut.starts[cut.count] * chunks;
  for (int64_t item = global_warp(); item < items; item += global_warps()) {
    const int64_t s = item / chunks;
    const int64_t c = (item % chunks * kWarp + lane_index()) * N;
    const int64_t begin = cut.segments[s];
    const int64_t row = row_of(cut.sorted[begin]);
    if (row >= cut.rows) continue;
    const bool first = begin == 0 || row_of(cut.sorted[begin - 1]) != row;
    A* to = first ? dweight + row * width : partials + begin / kSegment * width;
    A sums[N] = {};
    if (first && c < width) load_pack<N>(to + c, sums);
    add_rows<N>(cut.sorted, begin, cut.segments[s + 1], dout, width, c, factor, sums);
    if (c < width) store_pack<N>(sums, to + c);
  }
}

/// Adds the partial sums of runs of more than one segment onto the gradient, in order: one warp a row of
/// partials and 32 N columns. The warp at the run's first partial sum adds them all.
template <int N, class A>
__global__ void add_partials_kernel(Segments cut, int64_t width, const A* partials, A* dweight) {
  constexpr int kAhead = 8;
  const int64_t chunks = ceil_div(width, int64_t{kWarp} * N);
  const int64_t items = (ceil_div(cut.count, kSegment) - 1) * chunks;
  for (int64_t item = global_warp(); item < items; item += global_warps()) {
    const int64_t slot = 1 + item / chunks;
    const int64_t c = (item % chunks * kWarp + lane_index()) * N;
    const int64_t row = row_of(cut.sorted[slot * kSegment]);
    const int64_t run = first_of_row(cut.sorted, 0, slot * kSegment, row);
    const int64_t second = run + kSegment;
    if (row >= cut.rows || c >= width || second / kSegment != slot || second >= cut.count ||
        row_of(cut.sorted[second]) != row) {
      continue;
    }
    const int64_t end = first_of_row(cut.sorted, second, cut.count, row + 1);
    const int64_t rows = ceil_div(end - second, kSegment);
    A sums[N];
    load_pack<N>(dweight + row * width + c, sums);
    for (int64_t r = 0; r < rows; r += kAhead) {
      A x[kAhead][N] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (r + a < rows) load_pack<N>(partials + (slot + r + a) * width + c, x[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] = r + a < rows ? sums[j] + x[a][j] : sums[j];
      }
    }
    store_pack<N>(sums, dweight + row * width + c);
  }
}

template <int N, class T>
void add_sorted(Context& context, const Segments& cut, const Tensor& dout, double factor,
                const Tensor& dweight) {
  using A = Accumulator<T>;
  const int64_t width = dout.dim(1);
  const Tensor partials =
      context.empty({ceil_div(cut.count, kSegment), width}, dtype_of<A>(), MemoryUse::workspace);
  const int64_t chunks = ceil_div(width, int64_t{kWarp} * N);
  launch(context, warp_each(cut.count * chunks), add_segments_kernel<N, T>, cut, dout.data<T>(), width,
         static_cast<A>(factor), dweight.data<A>(), partials.data<A>());
  constexpr int kN = N < kPack<A> ? N : kPack<A>;
  const int64_t partial_chunks = ceil_div(width, int64_t{kWarp} * kN);
  launch(context, warp_each((partials.dim(0) - 1) * partial_chunks), add_partials_kernel<kN, A>, cut, width,
         partials.data<A>(), dweight.data<A>());
}

/// Threads of a block that goes over `packs` packs of a row: few rounds, and few threads idle in the last.
LaunchShape block_per_row(int64_t rows, int64_t packs) {
  const int64_t rounds = ceil_div(packs, int64_t{kThreads});
  return {.blocks = rows, .threads = static_cast<int>(round_up(ceil_div(packs, rounds), kWarp))};
}

template <int N, class T>
__global__ void add_positions_kernel(const T* embedded, Accumulator<T> factor, const T* positions,
                                     int64_t length, int64_t first_row, int64_t columns,
                                     DropoutMask<Accumulator<T>> mask, T* out) {
  using A = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const T* position = positions + (first_row + row) % length * columns;
  for (int64_t c = int64_t{threadIdx.x} * N; c < columns; c += int64_t{blockDim.x} * N) {
    A x[N], p[N], multipliers[N];
    load_pack<N>(embedded + row * columns + c, x);
    load_pack<N>(position + c, p);
    mask.template multipliers<N>(row, c, multipliers);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = (factor * x[i] + p[i]) * multipliers[i];
    store_pack<N>(x, out + row * columns + c);
  }
}

/// The block's position in every sequence, in the order of sequences; row 0 is position `into`. `dpositions`
/// may be null.
template <int N, class T>
__global__ void add_positions_backward_kernel(const T* dout, int64_t rows, int64_t length, int64_t into,
                                              int64_t columns, DropoutMask<Accumulator<T>> mask, T* dsum,
                                              Accumulator<T>* dpositions) {
  using A = Accumulator<T>;
  constexpr int kAhead = 4;
  const int64_t position = blockIdx.x;
  const int64_t first_of_position = position >= into ? position - into : position - into + length;
  A* sum_to = dpositions == nullptr ? nullptr : dpositions + position * columns;
  for (int64_t c = int64_t{threadIdx.x} * N; c < columns; c += int64_t{blockDim.x} * N) {
    A sums[N] = {};
    if (sum_to != nullptr) load_pack<N>(sum_to + c, sums);
    for (int64_t first = first_of_position; first < rows; first += kAhead * length) {
      A x[kAhead][N] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (first + a * length < rows) load_pack<N>(dout + (first + a * length) * columns + c, x[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t row = first + a * length;
        if (row >= rows) break;
        A multipliers[N];
        mask.template multipliers<N>(row, c, multipliers);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          x[a][i] *= multipliers[i];
          sums[i] += x[a][i];
        }
        store_pack<N>(x[a], dsum + row * columns + c);
      }
    }
    if (sum_to != nullptr) store_pack<N>(sums, sum_to + c);
  }
}

}  // namespace

void embedding_forward(Context& context, const Tensor& tokens, const Tensor& weight, int64_t first_row,
                       const Tensor& out) {
  dispatch_floating(out.dtype(), [&]<class T>() {
    const auto gather = [&]<int N>() {
      launch(context, warp_each(tokens.numel()), gather_kernel<N, T>, tokens.data<int32_t>(), tokens.numel(),
             reinterpret_cast<const Pack<T, N>*>(weight.data<T>()), weight.dim(0), out.dim(1) / N, first_row,
             reinterpret_cast<Pack<T, N>*>(out.data<T>()));
    };
    if (can_pack<kPack<T>>(out.dim(1), weight.data<T>(), out.data<T>())) {
      gather.template operator()<kPack<T>>();
    } else {
      gather.template operator()<1>();
    }
  });
}

void embedding_backward(Context& context, const Tensor& tokens, const Tensor& dout, double factor,
                        int64_t first_row, const Tensor& dweight) {
  const int64_t count = tokens.numel();
  const int64_t rows = dweight.dim(0);
  const Tensor entries = context.empty({count}, DType::i64, MemoryUse::workspace);
  launch(context, thread_each(count), list_kernel, tokens.data<int32_t>(), count, first_row, rows,
         entries.data<Entry>());
  const Tensor sorted = sort_by_row(context, entries, rows);
  const Tensor starts = context.empty({count + 1}, DType::i32, MemoryUse::workspace);
  const Tensor segments = context.empty({count + 1}, DType::i32, MemoryUse::workspace);
  launch(context, thread_each(count), mark_kernel, sorted.data<Entry>(), count, starts.data<int32_t>());
  scan(context, starts);
  launch(context, thread_each(count + 1), segments_kernel, starts.data<int32_t>(), count,
         segments.data<int32_t>());
  const Segments cut{sorted.data<Entry>(), count, rows, starts.data<int32_t>(), segments.data<int32_t>()};
  dispatch_floating(dout.dtype(), [&]<class T>() {
    if (can_pack<kPack<T>>(dout.dim(1), dout.data<T>(), dweight.data<Accumulator<T>>())) {
      add_sorted<kPack<T>, T>(context, cut, dout, factor, dweight);
    } else {
      add_sorted<1, T>(context, cut, dout, factor, dweight);
    }
  });
}

void add_positions_forward(Context& context, const Tensor& embedded, double factor, const Tensor& positions,
                           int64_t first_row, const Dropout& dropout, const Tensor& out) {
  dispatch_floating(embedded.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const int64_t columns = embedded.dim(1);
    const bool packs = can_pack<kN>(columns, embedded.data<T>(), positions.data<T>(), out.data<T>());
    const auto kernel = packs ? add_positions_kernel<kN, T> : add_positions_kernel<1, T>;
    launch(context, block_per_row(embedded.dim(0), packs ? columns / kN : columns), kernel,
           embedded.data<T>(), static_cast<A>(factor), positions.data<T>(), positions.dim(0), first_row,
           columns, DropoutMask<A>(dropout), out.data<T>());
  });
}

void add_positions_backward(Context& context, const Tensor& dout, int64_t length, int64_t first_row,
                            const Dropout& dropout, const Tensor& dsum, const Tensor& dpositions) {
  dispatch_floating(dout.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    constexpr int kN = kPack<T>;
    const int64_t rows = dout.dim(0);
    const int64_t columns = dout.dim(1);
    // Without sums every row can have its own block.
    const int64_t apart = dpositions ? length : rows;
    const int64_t into = dpositions ? first_row % length : 0;
    A* sums = dpositions ? dpositions.data<A>() : nullptr;
    const bool packs = can_pack<kN>(columns, dout.data<T>(), dsum.data<T>(), sums);
    const auto kernel = packs ? add_positions_backward_kernel<kN, T> : add_positions_backward_kernel<1, T>;
    launch(context, block_per_row(apart, packs ? columns / kN : columns), kernel, dout.data<T>(), rows, apart,
           into, columns, DropoutMask<A>(dropout), dsum.data<T>(), sums);
  });
}

}  // namespace normformer::ops::cuda
