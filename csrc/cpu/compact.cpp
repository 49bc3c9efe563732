// Gathers the kept rows and columns of a weight into a new, zero-padded one.

#include "../gather.h"
#include "indices.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace atp::cpu {
namespace {

template <typename T>
void gather(const Tensor& weight, const Gather& plan) {
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  T* to = static_cast<T*>(plan.out.mutable_data_ptr());
  const int64_t stride = weight.size(1);
  if (plan.out_cols == 0) return;  // however many rows there are
  for_rows(plan.out_rows, plan.out_cols, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      T* out = to + row * plan.out_cols;
      const int64_t kept = row < plan.rows ? plan.cols : 0;
      if (kept > 0) {
        const T* in = from + (plan.row_index ? plan.row_index[row] : row) * stride;
        if (plan.col_index == nullptr) {
          std::memcpy(out, in, kept * sizeof(T));
        } else {
          take(in, plan.col_index, kept, out);
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
  with_bits(weight, "compact", [&](auto tag) { gather<decltype(tag)>(weight, plan); });
  return plan.out;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("compact", TORCH_BOX(&atp::cpu::compact));
}
