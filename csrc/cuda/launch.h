// Launch helpers shared by the CUDA sources.
#pragma once

#include "../common.h"

#include <cuda_runtime.h>

namespace atp::cuda {

constexpr int kThreads = 256;

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, " did not launch: ", cudaGetErrorString(error), ".");
}

inline unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

inline cudaStream_t as_stream(int64_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

}  // namespace atp::cuda
