// Column sums over the rows of a matrix, and over those of each sample.
//
// A sum is made in two stages: float32 over blocks of rows, float64 over the blocks in their order. Blocks do not depend
// on the threads, so neither do the results.
#pragma once

#include "rows.h"

#include <memory>
#include <vector>

namespace atp::cpu {

constexpr int64_t kBlockRows = 64;

inline float* sums_of(const Tensor& sums) {
  return static_cast<float*>(sums.mutable_data_ptr());
}

// body(first row, number of rows, block) fills the sums of a block of rows; adds those of all blocks to sums [cols].
template <typename Body>
void add_column_sums(int64_t rows, int64_t cols, float* sums, const Body& body) {
  const int64_t n_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const std::unique_ptr<float[]> parts(new float[n_blocks * cols]);
  torch::stable::parallel_for(0, n_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows;
      body(first, std::min(kBlockRows, rows - first), parts.get() + block * cols);
    }
  });
  std::vector<double> totals(sums, sums + cols);
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t col = 0; col < cols; ++col) totals[col] += parts[block * cols + col];
  }
  std::copy(totals.begin(), totals.end(), sums);
}

// The number of samples that `rows` are of, each with a row of `sums` [samples, cols].
inline int64_t check_samples(const Tensor& sums, int64_t rows, int64_t cols) {
  check(sums.dim() == 2 && sums.scalar_type() == ScalarType::Float && sums.size(1) == cols && sums.size(0) > 0 &&
            (cols <= 1 || sums.stride(1) == 1) && (sums.size(0) == 1 || sums.stride(0) >= cols),
        "sums must be float32 [samples, ", cols, "] with contiguous rows that share no memory.");
  check(rows % sums.size(0) == 0, "the rows must be equally many for each sample.");
  return sums.size(0);
}

}  // namespace atp::cpu
