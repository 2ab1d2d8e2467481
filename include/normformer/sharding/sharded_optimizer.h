#pragma once

#include <span>
#include <string>
#include <vector>

#include "normformer/mesh/mesh.h"
#include "normformer/ops/optimizer.h"
#include "normformer/sharding/parameter_piece.h"
#include "normformer/sharding/parameter_store.h"

namespace normformer {

/// Which of a parameter's values an optimizer keeps.
enum class StateRole { master, moment1, moment2 };

/// A ParameterPiece of optimizer state; `values` shares memory with the optimizer.
struct StatePiece {
  StateRole role;
  ParameterPiece piece;
};

/// How large gradients are that one rank owns, without the others' knowledge.
struct GradientSize {
  double largest = 0.0;                        ///< |x|; +inf where any is not finite
  ops::OrderFreeSumOfSquares::Bins bins = {};  ///< of the squares, below `largest`; 0 where that is infinite
};

/// The largest of all; +inf where any is not finite.
double largest_of(std::span<const GradientSize> sizes);

/// The 2-norm of all gradients, from those of every rank: the same bits in every grouping of the same
/// gradients. +inf where any is not finite.
double norm_of(std::span<const GradientSize> sizes);

/// AdamW with its state sharded over the mesh's sharding group: ZeRO stage 1 (Rajbhandari et al. 2020,
/// section 5.1), and stages 2 and 3 over a store that holds gradients, or values too, in pieces.
///
/// Each bucket of the store is cut evenly over the group; a rank sums, keeps and updates its piece of each.
/// Master weights and moments are of the accumulator type; where the masters' type is the model's own, the
/// store's values are the masters. Pieces need not divide evenly, and nothing is padded. Where replicas form
/// several sharding groups, each has all of the state, with the same bits.
class ShardedOptimizer {
 public:
  /// The store's gradients are summed over these groups of `mesh`, as their declarations say. `masters` is
  /// the type of the master weights: the store's accumulator type, or its own.
  ShardedOptimizer(ParameterStore& store, DType masters, const Mesh& mesh);

  /// Draws this rank's weights from the seed, masters first; moments are zero. Collective over nothing: every
  /// rank draws its own.
  void initialise(uint64_t seed);

  /// Sums main gradients that are held whole over the ranks that their declarations name: vectors of a
  /// sequence-sharded stream over the tensor group and tied embeddings over the embedding group first, then
  /// every bucket over the replicas. Afterwards only this rank's pieces hold sums. Collective over the
  /// world.
  void reduce_gradients();

  /// Of the gradients that this rank owns, after reduce_gradients: over all ranks each scalar of the model is
  /// counted once, whoever holds it.
  GradientSize gradient_size();

  /// Updates this rank's pieces and gathers everyone's, until the store's await_values. Collective over the
  /// sharding group.
  void step(const ops::AdamW& update);

  /// Copies this rank's state to where restore finds it; the first call makes room for the copy.
  void keep();

  /// Puts back the state that was kept. What stands in the parameters is of no use then until step or
  /// publish_masters.
  void restore();

  /// Puts values that were written to the masters (by a checkpoint's reader) into the parameters of all
  /// ranks. Collective over the sharding group.
  void publish_masters();

  /// This rank's state, parameter by parameter, whether owned or a copy.
  std::vector<StatePiece> state() const;

  /// Whether this rank is the one that counts and saves its piece of a parameter, among all that hold it.
  bool owns(const Parameter& parameter) const { return parameter.spec.owned && is_first_block_; }

  /// The summed gradients that this rank owns, after reduce_gradients; they share memory with the store.
  std::vector<ParameterPiece> owned_gradients() const;

 private:
  template <class Visit>
  void for_each_run(Visit&& visit) const;
  std::vector<Tensor> owned_runs() const;
  Tensor master(size_t bucket) const;
  Tensor kept_master(size_t bucket) const;

  ParameterStore* store_;
  Group tensor_;
  Group embedding_;
  bool is_first_block_;
  std::vector<int64_t> state_offsets_;  // of each bucket's piece in the buffers below
  Tensor masters_;                      // undefined where the store's values are the masters
  Tensor moment1_;
  Tensor moment2_;
  Tensor kept_masters_;  // undefined until keep
  Tensor kept_moment1_;
  Tensor kept_moment2_;
};

}  // namespace normformer
