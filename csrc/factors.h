// The factors of one multi-tensor call, checked and reduced to plain pointers that CPU and CUDA code both read.
#pragma once

#include "common.h"

#include <algorithm>
#include <vector>

namespace atp {

// A slot is one row (by_row) or one column of one factor: the piece of it that belongs to one group.
struct Factor {
  const void* data;
  void* out;
  const int64_t* index;  // group id of every slot
  int64_t rows;
  int64_t cols;
  int64_t first_slot;
  bool by_row;
  bool is_bfloat16;

#ifdef __CUDACC__
  __host__ __device__
#endif
      int64_t slots() const {
    return by_row ? rows : cols;
  }
};

struct FactorList {
  std::vector<Factor> factors;
  int64_t slots = 0;
};

inline FactorList describe(
    const std::vector<Tensor>& factors,
    const std::vector<int64_t>& axes,
    const std::vector<Tensor>& index) {
  check(factors.size() == axes.size() && factors.size() == index.size(),
        "got ", factors.size(), " factors, ", axes.size(), " axes and ", index.size(),
        " index tensors; give one of each for every factor.");
  FactorList list;
  list.factors.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& factor = factors[i];
    const ScalarType dtype = factor.scalar_type();
    check(factor.dim() == 2 && factor.is_contiguous(), "factor ", i, " must be 2-D and contiguous.");
    check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
          "factor ", i, " must be float32 or bfloat16; cast it or use backend='reference'.");
    check(axes[i] == 0 || axes[i] == 1, "axis of factor ", i, " is ", axes[i], "; it must be 0 (rows) or 1 (columns).");
    const int64_t slots = factor.size(axes[i]);
    check(index[i].scalar_type() == ScalarType::Long && index[i].dim() == 1 && index[i].is_contiguous() &&
              index[i].numel() == slots,
          "index of factor ", i, " must be a contiguous int64 vector of length ", slots, ".");
    list.factors.push_back({factor.const_data_ptr(), nullptr, static_cast<const int64_t*>(index[i].const_data_ptr()),
                            factor.size(0), factor.size(1), list.slots, axes[i] == 0, dtype == ScalarType::BFloat16});
    list.slots += slots;
  }
  return list;
}

// Points `out` at the factors themselves. Two entries over one storage would be scaled twice, by threads that race.
inline void write_in_place(FactorList& list) {
  std::vector<const void*> seen;
  for (Factor& factor : list.factors) {
    factor.out = const_cast<void*>(factor.data);
    if (factor.rows * factor.cols > 0) seen.push_back(factor.data);
  }
  std::sort(seen.begin(), seen.end());
  check(std::adjacent_find(seen.begin(), seen.end()) == seen.end(),
        "a tensor appears twice among the factors of an in-place call; give each of them once.");
}

// Points `out` at new tensors like the factors, and returns those.
inline std::vector<Tensor> write_to_new(FactorList& list, const std::vector<Tensor>& factors) {
  std::vector<Tensor> outputs;
  outputs.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    outputs.push_back(torch::stable::empty_like(factors[i]));
    list.factors[i].out = outputs.back().mutable_data_ptr();
  }
  return outputs;
}

inline void check_group_vector(const Tensor& tensor, ScalarType dtype, int64_t n_groups, const char* name) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == n_groups,
        name, " must be contiguous, of the documented dtype and hold one entry per group (", n_groups, ").");
}

}  // namespace atp
