// Gathers the kept rows and columns of a weight into a new, zero-padded one.

#include "../gather.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace atp::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;

void check_range(const int64_t* index, int64_t count, int64_t size, const char* name) {
  if (index == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    check(index[i] >= 0 && index[i] < size, name, "[", i, "] is ", index[i], ", outside [0, ", size, ").");
  }
}

// The copy depends on an element's size alone, so T is an unsigned integer standing for every dtype of its size.
template <typename T>
void gather(const Tensor& weight, const Gather& plan) {
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  T* to = static_cast<T*>(plan.out.mutable_data_ptr());
  const int64_t stride = weight.size(1);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, plan.out_cols));
  torch::stable::parallel_for(0, plan.out_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = to + row * plan.out_cols;
      const int64_t kept = row < plan.rows ? plan.cols : 0;
      if (kept > 0) {
        const T* in = from + (plan.row_index ? plan.row_index[row] : row) * stride;
        if (plan.col_index == nullptr) {
          std::memcpy(out, in, kept * sizeof(T));
        } else {
          for (int64_t col = 0; col < kept; ++col) out[col] = in[plan.col_index[col]];
        }
      }
      std::fill(out + kept, out + plan.out_cols, T{0});
    }
  });
}

Tensor compact(
    Tensor weight, std::optional<Tensor> rows, std::optional<Tensor> cols, int64_t pad_to, int64_t /*stream*/) {
  const Gather plan = plan_gather(weight, rows, cols, pad_to);
  check_range(plan.row_index, plan.rows, weight.size(0), "rows");
  check_range(plan.col_index, plan.cols, weight.size(1), "cols");
  switch (weight.element_size()) {
    case 1: gather<uint8_t>(weight, plan); break;
    case 2: gather<uint16_t>(weight, plan); break;
    case 4: gather<uint32_t>(weight, plan); break;
    case 8: gather<uint64_t>(weight, plan); break;
    default: check(false, "compact takes elements of 1, 2, 4 or 8 bytes.");
  }
  return plan.out;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("compact", TORCH_BOX(&atp::cpu::compact));
}
