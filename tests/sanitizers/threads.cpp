// torch_parallel_for on threads that ThreadSanitizer follows: torch's own are those of an OpenMP runtime that was built
// without it, so every barrier there would be reported as a race. Linked into the extension, this one takes its place.
//
// The range is cut into four parts, however small: a race then needs no large matrix to show.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t /*grain_size*/, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kParts = 4;
  const int64_t step = std::max<int64_t>(1, (end - begin + kParts - 1) / kParts);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step) {
    threads.emplace_back(body, first, std::min(first + step, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
