#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/mesh/parameter.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// A run of consecutive parameters whose gradients are reduced, and values gathered, together over the
/// ranks of a sharding group, each of which answers for one piece.
struct Bucket {
  Range flat;  ///< elements, in the numbering of Parameter::offset
  GradientSum sum_over;
  int64_t unit = -1;            ///< as in ParameterSpec; -1 where parameters of several units share it
  std::vector<int64_t> counts;  ///< elements of every rank's piece
  Range piece;                  ///< this rank's, in the same numbering as `flat`
  Tensor values;                ///< whole; undefined while only pieces are held
  Tensor gradients;             ///< whole; undefined while only pieces are held, or where there are none
  Tensor value_piece;
  Tensor gradient_piece;

  int64_t size() const { return flat.size(); }
};

/// How a store holds its parameters.
struct StoreOptions {
  int64_t bucket_bytes = 32 << 20;  ///< about so many of main gradients make a bucket
  bool with_gradients = true;       ///< false for evaluation
  Sharding sharding = Sharding::optimizer;
  bool overlap_gradients = false;  ///< reduce gradients beside the rest of the backward
  bool overlap_values = false;     ///< gather values beside what comes before their use
};

/// One rank's parameters, values and main gradients, cut into buckets. Parameters are declared first, in the
/// order of the forward pass, then allocated together; references to them stay valid. Those whose gradients
/// are summed over the tensor group, vectors of the residual stream, lie behind all others, so that they
/// share a bucket, which is always whole. Owns the memory.
///
/// Under Sharding::gradients the main gradients of units, and under Sharding::parameters their values too,
/// are held in pieces, a rank's share of each bucket; they are whole only between open_* and close_values or
/// reduce_gradients. A parameter's tensors are undefined while they are not whole.
///
/// Replicas may form several sharding groups, each with a copy of everything (hybrid sharding: Zhao et al.
/// 2023, PyTorch FSDP, section 3.2.2). Then each piece is summed over its group first, and over the copies of
/// it in the other groups, the replication group, afterwards: once a step.
///
/// With the options to overlap, what is reduced and gathered is started as early and waited for as late as
/// can be, in an order that depends on the calls alone; every bit is as without.
class ParameterStore {
 public:
  /// Values are of `dtype`, main gradients of its accumulator type.
  ParameterStore(Context& context, DType dtype) : context_(&context), dtype_(dtype) {}
  ParameterStore(const ParameterStore&) = delete;
  ParameterStore& operator=(const ParameterStore&) = delete;

  /// Adds a parameter. LogicError for a name declared before, or after allocate().
  Parameter& declare(ParameterSpec spec);

  /// The parameter of that name; null where none was declared.
  Parameter* find(std::string_view name);

  /// Makes the buffers: values undefined, gradients zero. All parameters of a bucket have the same gradient
  /// sum. `sharding` is the group that splits what is split, and `replication` those that hold the same
  /// pieces in other such groups; undefined where there are none.
  void allocate(const Group& sharding, const StoreOptions& options, const Group& replication = {});

  /// Makes the values of a unit whole, for use, and of what stands before it and right behind it in the order
  /// of the forward pass. Does nothing where they are. Collective over `sharding`, where they are split.
  void open_values(int64_t unit);
  void close_values(int64_t unit);

  /// Says that the unit will be opened next. Collective over `sharding`, where values are split.
  void prefetch_values(int64_t unit);

  /// Gathers the values of a bucket that is held whole, from everyone's pieces; they may be there only when
  /// opened, or after await_values. Collective over `sharding`.
  void gather_values(size_t bucket);

  /// Waits for what gather_values has begun: all, or what a unit needs (see open_values).
  void await_values();
  void await_values(int64_t unit);

  /// Whether a unit's values are to be expected only when it is opened for use.
  bool gathers_for_use() const {
    return options_.overlap_values || options_.sharding == Sharding::parameters;
  }

  /// Makes room for a micro-batch's gradients of a unit. Does nothing where they are held whole.
  void open_gradients(int64_t unit);

  /// Adds the sums over `sharding` of the gradients gathered since a unit was opened to the pieces, at once
  /// or until await_gradients; the room is given up once this has been called as often as open_gradients.
  /// Does nothing where they are held whole. Collective over `sharding`, where they are split.
  void reduce_gradients(int64_t unit);

  /// Says that this step adds nothing more to the gradients that are finished with this unit's backward: a
  /// bucket of nothing else may be reduced from now on, and its pieces over `replication`. Collective over
  /// all replicas, where gradients overlap.
  void finish_gradients(int64_t unit);

  /// Ends a step's reduce_gradients: the pieces have all that it was called for, summed over `replication`
  /// too. Collective over `replication`, where gradients are split.
  void await_gradients();

  /// Sums a bucket that is held whole over all replicas, into the pieces. Collective over all replicas.
  void reduce_bucket(size_t bucket);

  /// Whether a bucket's gradients, or values, are held in pieces.
  bool splits_gradients(const Bucket& bucket) const;
  bool splits_values(const Bucket& bucket) const;

  /// Values, or gradients, of consecutive parameters declared with joins_previous, as one matrix.
  Tensor joined_value(const Parameter& first, const Shape& shape) const;
  Tensor joined_gradient(const Parameter& first, const Shape& shape) const;

  const std::deque<Parameter>& parameters() const { return parameters_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  DType dtype() const { return dtype_; }
  Context& context() const { return *context_; }

  /// What is held whole, buckets in order: everything, under Sharding::optimizer.
  const Tensor& flat_values() const { return values_; }
  const Tensor& flat_gradients() const { return gradients_; }

  /// Elements `run` of the gradients that are held whole; it begins in this bucket and lies in such buckets.
  Tensor whole_gradients(size_t bucket, const Range& run) const;

  /// Zeros in whatever gradients are held.
  void zero_gradients();

  /// Scalars of the logical parameters that this rank owns.
  int64_t owned_scalars() const;

 private:
  std::vector<Parameter*> in_flat_order();
  void place_parameters();
  void cut_buckets();
  const Bucket& bucket_of(const Parameter& parameter) const;
  template <class Body>
  void for_each_split(int64_t unit, bool (ParameterStore::*splits)(const Bucket&) const, Body&& body);
  void show(const Bucket& bucket);
  void find_order_of_use();
  void count_unfinished();
  void start_arrival(const Bucket& bucket);
  CommRequest gather(const Bucket& bucket, const Tensor& whole) const;
  CommRequest reduce(const Bucket& bucket, const Tensor& whole, const Tensor& piece) const;
  void end_oldest_reduction();
  void replicate_previous();
  void replicate_finished(int64_t unit);
  void start_replication(size_t bucket);
  void end_oldest_replication();

  // Values that are being gathered.
  struct Arrival {
    Tensor values;
    CommRequest request;
  };
  // A unit's gradients that are being summed.
  struct Reduction {
    const Bucket* bucket;
    Tensor whole;
    Tensor sum;
    CommRequest request;
  };

  Context* context_;
  DType dtype_;
  StoreOptions options_;
  Group sharding_;
  Group replication_;
  std::deque<Parameter> parameters_;
  std::vector<Bucket> buckets_;
  std::vector<int> open_gradients_;     // of each bucket: open_gradients that wait for their reduce_gradients
  std::vector<Arrival> arrivals_;       // of each bucket
  std::vector<CommRequest> finished_;   // of each bucket that is held whole: its reduction
  std::optional<size_t> unreplicated_;  // the bucket whose reduction goes no further than `sharding` yet
  std::vector<std::vector<int64_t>> units_;  // of each bucket: with which units its gradients are finished
  std::vector<size_t> unfinished_;           // of each bucket: how many of these are not yet
  std::map<int64_t, int64_t> needed_;        // of each unit: where what it needs ends, in elements
  std::deque<Reduction> reductions_;         // the oldest first
  std::set<int64_t> finished_units_;         // of this step
  std::vector<bool> replicated_;          // of each bucket that is split: whether its sum over copies began
  std::deque<CommRequest> replications_;  // of buckets that are split, the oldest first
  int64_t flat_size_ = 0;
  Tensor values_;           // of whole buckets
  Tensor gradients_;        // of whole buckets
  Tensor value_pieces_;     // of the others
  Tensor gradient_pieces_;  // of the others
};

/// A unit's values, whole for as long as this lives. Collective over the sharding group, where they are
/// split.
class OpenValues {
 public:
  OpenValues(ParameterStore& store, int64_t unit) : store_(&store), unit_(unit) { store.open_values(unit); }
  ~OpenValues() { store_->close_values(unit_); }
  OpenValues(const OpenValues&) = delete;
  OpenValues& operator=(const OpenValues&) = delete;

 private:
  ParameterStore* store_;
  int64_t unit_;
};

/// Draws one parameter's part as its spec says, from the run's seed and the parameter's name alone, into
/// `out` (of f32 or f64, as many elements as the part).
void draw_initial_values(Context& context, const ParameterSpec& spec, uint64_t seed, const Tensor& out);

}  // namespace normformer
