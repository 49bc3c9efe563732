// The factors of one multi-tensor call, checked and reduced to plain pointers that CPU and CUDA code both read.
//
// A call brings the tensors of a GroupPlan: `index` (group of every slot, factor after factor), `order` (slots sorted
// by group) and `starts` (where each group begins in `order`). The plan checked their values; here sizes are checked.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace atp {

// A slot is one row (by_row) or one column of one factor: the piece of it that belongs to one group.
struct Factor {
  const void* data;
  void* out;
  const int32_t* index;  // group id of every slot
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

inline const int32_t* int32_vector(const Tensor& tensor, int64_t size, const char* name) {
  check(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.numel() == size,
        name, " must be a contiguous int32 vector of length ", size, ", as a GroupPlan of these factors has it.");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

inline FactorList describe(const std::vector<Tensor>& factors, const std::vector<int64_t>& axes, const Tensor& index) {
  check(factors.size() == axes.size(), "got ", factors.size(), " factors and ", axes.size(), " axes; give one of each.");
  FactorList list;
  list.factors.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& factor = factors[i];
    const ScalarType dtype = factor.scalar_type();
    check(factor.dim() == 2 && factor.is_contiguous(), "factor ", i, " must be 2-D and contiguous.");
    check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
          "factor ", i, " must be float32 or bfloat16; cast it or use backend='reference'.");
    check(axes[i] == 0 || axes[i] == 1, "axis of factor ", i, " is ", axes[i], "; it must be 0 (rows) or 1 (columns).");
    list.factors.push_back({factor.const_data_ptr(), nullptr, nullptr, factor.size(0), factor.size(1), list.slots,
                            axes[i] == 0, dtype == ScalarType::BFloat16});
    list.slots += list.factors.back().slots();
  }
  const int32_t* ids = int32_vector(index, list.slots, "index");
  for (Factor& factor : list.factors) factor.index = ids + factor.first_slot;
  return list;
}

// The slots of every group: order[starts[group]] to order[starts[group + 1] - 1], ascending.
struct GroupSlots {
  const int32_t* order;
  const int32_t* starts;
};

inline GroupSlots group_slots(const FactorList& list, const Tensor& order, const Tensor& starts, int64_t n_groups) {
  return {int32_vector(order, list.slots, "order"), int32_vector(starts, n_groups + 1, "starts")};
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

// Points `out` at new tensors like the factors, and returns those: pieces of one allocation for each dtype. Hundreds of
// small allocations would cost more than the arithmetic, and the allocator would give their pages back every time.
inline std::vector<Tensor> write_to_new(FactorList& list, const std::vector<Tensor>& factors) {
  constexpr int64_t kAlignment = 64;  // elements
  int64_t sizes[2] = {0, 0};
  for (const Factor& factor : list.factors) {
    sizes[factor.is_bfloat16] += (factor.rows * factor.cols + kAlignment - 1) / kAlignment * kAlignment;
  }
  std::optional<Tensor> storage[2];
  int64_t used[2] = {0, 0};
  std::vector<Tensor> outputs;
  outputs.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    Factor& factor = list.factors[i];
    const int kind = factor.is_bfloat16;
    if (!storage[kind]) storage[kind] = torch::stable::new_empty(factors[i], {sizes[kind]});
    const int64_t shape[2] = {factor.rows, factor.cols}, strides[2] = {factor.cols, 1};
    AtenTensorHandle piece = nullptr;
    check(aoti_torch__reinterpret_tensor(storage[kind]->get(), 2, shape, strides, used[kind], &piece) == 0,
          "the gradient of factor ", i, " cannot be placed.");
    outputs.emplace_back(piece);
    factor.out = outputs.back().mutable_data_ptr();
    used[kind] += (factor.rows * factor.cols + kAlignment - 1) / kAlignment * kAlignment;
  }
  return outputs;
}

inline void check_group_vector(const Tensor& tensor, ScalarType dtype, int64_t n_groups, const char* name) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == n_groups,
        name, " must be contiguous, of the documented dtype and hold one entry per group (", n_groups, ").");
}

}  // namespace atp
