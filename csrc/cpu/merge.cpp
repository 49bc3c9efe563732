// A frozen adapter merged into its weight on the way from float32 to bfloat16, which reads and writes what the cast does.

#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace atp::cpu {
namespace {

void check_matrix(const Tensor& values, const char* name, int64_t rows, int64_t cols) {
  check(values.dim() == 2 && values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
            values.size(0) == rows && values.size(1) == cols,
        name, " must be a contiguous float32 matrix [", rows, ", ", cols, "].");
}

Tensor merged_weight(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling) {
  check(weight.dim() == 2 && lora_a.dim() == 2, "weight and lora_a must be 2-D.");
  const int64_t rows = weight.size(0), cols = weight.size(1), rank = lora_a.size(0);
  check_matrix(weight, "weight", rows, cols);
  check_matrix(lora_a, "lora_a", rank, cols);
  check_matrix(lora_b, "lora_b", rows, rank);
  Tensor merged = torch::stable::new_empty(weight, {rows, cols}, ScalarType::BFloat16);
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  const float* down = static_cast<const float*>(lora_a.const_data_ptr());
  const float* up = static_cast<const float*>(lora_b.const_data_ptr());
  bfloat16* to = static_cast<bfloat16*>(merged.mutable_data_ptr());
  for_rows(rows, cols, [&](int64_t first, int64_t count) {
    std::vector<float> factors(rank);
    for (int64_t row = first; row < first + count; ++row) {
      for (int64_t j = 0; j < rank; ++j) factors[j] = static_cast<float>(scaling) * up[row * rank + j];
      loops().merge_row(from + row * cols, down, factors.data(), rank, cols, to + row * cols);
    }
  });
  return merged;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("merged_weight", TORCH_BOX(&atp::cpu::merged_weight));
}
