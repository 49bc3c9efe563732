// What the operations over rows of a matrix share: the element type, and the rows on torch's threads.
#pragma once

#include "../common.h"
#include "loops.h"

#include <algorithm>

namespace atp::cpu {

constexpr int64_t kGrainElements = 16384;

// Calls body(T{}) for the element type of `values`.
template <typename Body>
void with_type(const Tensor& values, const Body& body) {
  if (values.scalar_type() == ScalarType::BFloat16) {
    body(bfloat16{});
  } else {
    body(float{});
  }
}

// Calls body(first row, number of rows) on torch's threads.
template <typename Body>
void for_rows(int64_t rows, int64_t cols, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

// Throws where the rows of a matrix that is written share memory: threads would race for it.
inline void check_apart(const Tensor& values, const char* name) {
  check(values.size(0) <= 1 || values.stride(0) >= values.size(1), name, " must have rows that share no memory.");
}

}  // namespace atp::cpu
