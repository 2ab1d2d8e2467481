#pragma once

#include <stdexcept>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

namespace simt {

/// Elements in the emulated GPU's memory.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    if (cudaMalloc(&data_, count * sizeof(T)) != cudaSuccess) throw std::runtime_error("no memory");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }

  /// What is there once the default stream's work is done.
  std::vector<T> on_host() const {
    std::vector<T> values(count_);
    cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

/// Enqueues a kernel on the default stream.
template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

/// The words of the std::logic_error that waiting for the default stream throws.
inline std::string failure() {
  try {
    cudaStreamSynchronize(nullptr);
  } catch (const std::logic_error& e) {
    return e.what();
  }
  return "no failure";
}

}  // namespace simt
