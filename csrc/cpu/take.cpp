// Columns of activations in another order: taken to another tensor, or spread in place.

#include "../gather.h"
#include "indices.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace atp::cpu {
namespace {

void check_matrix(const Tensor& values, const char* name) {
  check(values.dim() == 2 && values.stride(1) == 1, name, " must be 2-D, each row in one piece.");
}

// out = values[:, index]; rows of either may lie apart.
void take_columns(Tensor values, Tensor index, Tensor out) {
  check_matrix(values, "values");
  check_matrix(out, "out");
  check_apart(out, "out");
  const int64_t rows = values.size(0), count = index.numel();
  check(out.size(0) == rows && out.size(1) == count && out.scalar_type() == values.scalar_type(),
        "out must be [", rows, ", ", count, "], of the dtype of values.");
  const std::vector<uint32_t> order = columns(index_pointer(index, "index"), count, values.size(1), "index");
  with_bits(values, "take_columns", [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(values.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t from_stride = values.stride(0), to_stride = out.stride(0);
    for_rows(rows, count, [&](int64_t first, int64_t n) {
      for (int64_t row = first; row < first + n; ++row) {
        take(from + row * from_stride, order.data(), count, to + row * to_stride);
      }
    });
  });
}

// values = values[:, :width][:, place], through a copy of one row's head per thread.
void spread_columns_(Tensor values, int64_t width, Tensor place) {
  check_matrix(values, "values");
  check_apart(values, "values");
  const int64_t rows = values.size(0), count = values.size(1);
  check(place.numel() == count && width >= 0 && width <= count,
        "place needs ", count, " entries and width lies in [0, ", count, "].");
  const std::vector<uint32_t> order = columns(index_pointer(place, "place"), count, width, "place");
  with_bits(values, "spread_columns_", [&](auto tag) {
    using T = decltype(tag);
    T* all = static_cast<T*>(values.mutable_data_ptr());
    const int64_t stride = values.stride(0);
    for_rows(rows, count, [&](int64_t first, int64_t n) {
      std::vector<T> head(width);
      for (int64_t row = first; row < first + n; ++row) {
        std::copy_n(all + row * stride, width, head.begin());
        take(head.data(), order.data(), count, all + row * stride);
      }
    });
  });
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("take_columns", TORCH_BOX(&atp::cpu::take_columns));
  m.impl("spread_columns_", TORCH_BOX(&atp::cpu::spread_columns_));
}
