#include "normformer/core/error.h"
#include "normformer/tensor/gpu.h"

#include "tensor/cuda/elementwise.h"

// What stands in for src/tensor/cuda/ in a build without CUDA.

namespace normformer {

std::vector<GpuDescription> list_gpus() { return {}; }

std::string describe_cuda() { return "this build has no CUDA (configure with -DNORMFORMER_CUDA=ON)"; }

namespace {

[[noreturn]] void missing() { throw ConfigError("no GPU can be used: " + describe_cuda()); }

}  // namespace

class Gpu::Staging {};

Gpu::Gpu(int) { missing(); }
Gpu::~Gpu() = default;
void* Gpu::allocate(int64_t) { missing(); }
void Gpu::free(void*) noexcept {}
Gpu::Memory Gpu::memory() const { missing(); }
void Gpu::copy_in(void*, const void*, int64_t) { missing(); }
void Gpu::copy_out(void*, const void*, int64_t) { missing(); }
void Gpu::copy(void*, const void*, int64_t) { missing(); }
void Gpu::fill_zero(void*, int64_t) { missing(); }
void Gpu::synchronize() { missing(); }
GpuMoment Gpu::mark(void*) { missing(); }
double Gpu::seconds_between(const GpuMoment&, const GpuMoment&) const { missing(); }
void Gpu::run_as_graph(GpuGraph&, const std::function<void()>&) { missing(); }
void Gpu::begin_range(const char*) {}
void Gpu::end_range() {}

namespace cuda {

void convert(Context&, const Tensor&, const Tensor&) { missing(); }
void scale(Context&, const Tensor&, double) { missing(); }
void sum_in_order(Context&, std::span<const Tensor>, const Tensor&) { missing(); }
void max_in_order(Context&, std::span<const Tensor>, const Tensor&) { missing(); }

}  // namespace cuda
}  // namespace normformer
