// The inner loops of the group operations, compiled once per instruction set and picked at run time.
#pragma once

#include <cstdint>
#include <vector>

namespace atp::cpu {

struct bfloat16 {
  uint16_t bits;
};

// Row-major tiles. `stride` is the distance between rows in elements; `scale` has one entry per row or per column.
// A zero scale writes exact zeros, whatever the input holds.
template <typename T>
struct GroupLoops {
  void (*row_squares)(const T* x, int64_t rows, int64_t cols, float* out);
  void (*column_squares)(const T* x, int64_t rows, int64_t cols, int64_t stride, float* out);
  void (*scale_rows)(const T* x, int64_t rows, int64_t cols, const float* scale, T* out);
  void (*scale_columns)(const T* x, int64_t rows, int64_t cols, int64_t stride, const float* scale, T* out);
};

struct Loops {
  const char* isa;
  GroupLoops<float> float32;
  GroupLoops<bfloat16> bfloat16_;
};

template <typename T>
const GroupLoops<T>& loops_for(const Loops& loops) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return loops.float32;
  } else {
    return loops.bfloat16_;
  }
}

// Every set in this binary, from the baseline up.
const std::vector<Loops>& compiled_loops();

// The best set this processor runs, or the one the environment variable ATP_KERNELS_ISA names.
// Throws std::runtime_error for a name that is unknown or that this processor cannot run.
const Loops& loops();

}  // namespace atp::cpu
