#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/mesh/mesh.h"
#include "normformer/tensor/dtype.h"

namespace normformer::testing_support {

/// A model with tokens and everything that an independent implementation computed for it in fp64
/// (tests/oracle/normformer_reference.py).
struct OracleFixture {
  std::filesystem::path folder;
  RunConfig config;
  int64_t sequences = 0;
  int64_t steps = 0;
};

/// The folders under tests/fixtures/oracle, sorted.
std::vector<std::string> oracle_fixture_names();

OracleFixture load_oracle_fixture(const std::string& name);

/// How a fixture is run.
struct OracleLayout {
  MeshDegrees degrees;
  bool sequence = false;
  Precision precision = Precision::fp64;
  FfnNormForm form = FfnNormForm::folded;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  int64_t virtual_stages = 1;
  Recompute recompute = Recompute::none;
  Sharding sharding = Sharding::optimizer;
  int64_t shard_group = 0;
  int64_t micro_batch = 1;
  DType weights = DType::f64;  ///< what the fixture's weights are rounded to before all else
  int threads = 1;             ///< of each rank
  DeviceKind device = DeviceKind::cpu;
};

/// The degrees that every fixture is held to: alone and combined, up to 8 ranks, with sizes that do not
/// divide.
std::vector<MeshDegrees> oracle_degrees();

/// "tp2 pp1 dp3 plain"
std::string to_string(const OracleLayout& layout);

/// Relative errors in norm against the fixture's numbers, by tensor: "nll", "grad....", "losses".
using OracleErrors = std::map<std::string, double>;

/// The errors of the fixture on this layout, the gradients' on rank 0 only. Collective over the world.
OracleErrors oracle_errors(const OracleFixture& fixture, const OracleLayout& layout, const Group& world);

/// Runs the fixture on this layout and compares nll, gradients and losses with the fixture's, tensor by
/// tensor, in norm, to a relative `tolerance`. Returns what disagreed, one line each, the same on every rank.
/// Collective over the world.
std::vector<std::string> compare_with_oracle(const OracleFixture& fixture, const OracleLayout& layout,
                                             const Group& world, double tolerance);

/// The losses of `steps` steps from drawn weights with every dropout on, and of the validation that follows,
/// on a layout. Collective over the world.
std::vector<double> dropout_losses(const OracleFixture& fixture, const OracleLayout& layout,
                                   const Group& world, int64_t steps);

}  // namespace normformer::testing_support
