// Cross-entropy of rows of logits: the loss, and its gradient in the place of the logits, while a row is in cache.

#include "rows.h"

#include <torch/csrc/stable/library.h>

namespace atp::cpu {
namespace {

Tensor cross_entropy_(Tensor logits, Tensor targets) {
  const ScalarType dtype = logits.scalar_type();
  check(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, "logits must be 2-D, contiguous, not empty.");
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "logits must be float32 or bfloat16.");
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() && targets.numel() == rows,
        "targets must be a contiguous int64 vector of length ", rows, ".");
  const int64_t* target = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    check(target[row] >= 0 && target[row] < cols, "target ", target[row], " is outside a vocabulary of ", cols, ".");
  }
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  float* loss = static_cast<float*>(losses.mutable_data_ptr());
  with_type(logits, [&](auto tag) {
    using T = decltype(tag);
    T* values = static_cast<T*>(logits.mutable_data_ptr());
    for_rows(rows, cols, [&](int64_t first, int64_t count) {
      const auto body = softmax_for<T>(loops()).cross_entropy_row;
      for (int64_t row = first; row < first + count; ++row) {
        loss[row] = static_cast<float>(body(values + row * cols, cols, target[row]));
      }
    });
  });
  return losses;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&atp::cpu::cross_entropy_));
}
