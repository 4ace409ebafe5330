// Host side of CUDA: errors, device buffers, launches.
#pragma once

#ifdef PIDIFF_CUDA_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pidiff::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA failed: ") + cudaGetErrorString(error));
}

// Device memory with a copy of `bytes` host bytes (or uninitialised, for null).
class Buffer {
 public:
  Buffer(const void* host, std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, bytes > 0 ? bytes : 1));
    if (host == nullptr || bytes == 0) return;
    const cudaError_t error = cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice);
    if (error != cudaSuccess) cudaFree(data_);
    check(error);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  // Waits for the work before it on the default stream.
  void copy_to(void* host) const {
    if (bytes_ > 0) check(cudaMemcpy(host, data_, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<std::size_t>(shared_bytes), stream>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace pidiff::cuda

#endif
