// What csrc/cuda needs of CUDA, on a CPU: each thread of a block is a thread, and memory is the host's.
//
// kGroups blocks run at a time, as on as many multiprocessors, each with shared memory of its own; a group takes one
// block after the other. cuda_on_cpu.py rewrites launches to `shim::run` and shared arrays to `shim::shared`.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr unsigned kGroups = 2;

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t round = round_;
    if (++waiting_ == count_) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned count_, waiting_ = 0;
  uint64_t round_ = 0;
};

inline thread_local Barrier* barrier = nullptr;
inline thread_local unsigned group = 0;

// Shared memory of the caller's group; each place in a source has its own.
template <typename Array, int place>
Array& shared() {
  static Array arrays[kGroups];
  return arrays[group];
}

template <typename Kernel, typename... Arguments>
void run(dim3 grid, unsigned threads, Kernel kernel, Arguments... arguments) {
  std::vector<std::unique_ptr<Barrier>> barriers;
  std::vector<std::thread> running;
  for (unsigned own = 0; own < kGroups; ++own) {
    barriers.push_back(std::make_unique<Barrier>(threads));
    Barrier* mine = barriers.back().get();
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        group = own, barrier = mine;
        threadIdx = dim3(thread), blockDim = dim3(threads), gridDim = grid;
        for (uint64_t block = own; block < uint64_t{grid.x} * grid.y; block += kGroups) {
          blockIdx = dim3(static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x));
          kernel(arguments...);
          mine->wait();  // the next block of the group has its shared memory
        }
      });
    }
  }
  for (std::thread& one : running) one.join();
}

}  // namespace shim

inline void __syncthreads() { shim::barrier->wait(); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaMemcpyHostToDevice = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
