// What compact does on every device before it copies: checks, the output and its padded shape.
#pragma once

#include "common.h"

#include <optional>

namespace atp {

struct Gather {
  Tensor out;
  int64_t rows, cols;          // kept, without padding
  int64_t out_rows, out_cols;  // with padding
  const int64_t* row_index;    // null: all
  const int64_t* col_index;
};

inline const int64_t* index_pointer(const std::optional<Tensor>& index, const char* name) {
  if (!index) return nullptr;
  check(index->scalar_type() == ScalarType::Long && index->dim() == 1 && index->is_contiguous(),
        name, " must be a contiguous int64 vector.");
  return static_cast<const int64_t*>(index->const_data_ptr());
}

inline Gather plan_gather(
    const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& cols, int64_t pad_to) {
  check(weight.dim() == 2 && weight.is_contiguous(), "weight must be 2-D and contiguous.");
  check(pad_to > 0, "pad_to is ", pad_to, "; it must be positive.");
  // Adding pad_to to the size first could overflow.
  const auto padded = [pad_to](int64_t size) { return (size / pad_to + (size % pad_to != 0)) * pad_to; };
  Gather plan;
  plan.row_index = index_pointer(rows, "rows");
  plan.col_index = index_pointer(cols, "cols");
  plan.rows = rows ? rows->numel() : weight.size(0);
  plan.cols = cols ? cols->numel() : weight.size(1);
  plan.out_rows = rows ? padded(plan.rows) : plan.rows;
  plan.out_cols = cols ? padded(plan.cols) : plan.cols;
  plan.out = torch::stable::new_empty(weight, {plan.out_rows, plan.out_cols});
  return plan;
}

}  // namespace atp
