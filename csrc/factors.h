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

// Leaves `index` out, which slots that are groups of their own do not need.
inline FactorList describe(const std::vector<Tensor>& factors, const std::vector<int64_t>& axes) {
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
  return list;
}

inline FactorList describe(const std::vector<Tensor>& factors, const std::vector<int64_t>& axes, const Tensor& index) {
  FactorList list = describe(factors, axes);
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

// Two entries over one storage would be written twice, by threads that race.
inline void check_written_once(const FactorList& list) {
  std::vector<const void*> seen;
  for (const Factor& factor : list.factors) {
    if (factor.rows * factor.cols > 0) seen.push_back(factor.out);
  }
  std::sort(seen.begin(), seen.end());
  check(std::adjacent_find(seen.begin(), seen.end()) == seen.end(),
        "a tensor appears twice among the factors of an in-place call; give each of them once.");
}

// Points `out` at the factors themselves.
inline void write_in_place(FactorList& list) {
  for (Factor& factor : list.factors) factor.out = const_cast<void*>(factor.data);
  check_written_once(list);
}

// The tensors, with copies in place of those that are not contiguous.
inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    result.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  }
  return result;
}

// Brings what was written to those copies back.
inline void write_back(const std::vector<Tensor>& copies, std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (copies[i].get() != tensors[i].get()) torch::stable::copy_(tensors[i], copies[i]);
  }
}

// sides: rows and columns of every factor, as the plan knows them.
inline void check_sides(const FactorList& list, const std::vector<int64_t>& sides) {
  bool same = sides.size() == 2 * list.factors.size();
  for (size_t i = 0; same && i < list.factors.size(); ++i) {
    same = list.factors[i].rows == sides[2 * i] && list.factors[i].cols == sides[2 * i + 1];
  }
  check(same, "the plan was made for factors of other shapes.");
}

// Points `out` at gradients that are there already.
inline void add_to(FactorList& list, const std::vector<Tensor>& grads) {
  check(grads.size() == list.factors.size(), "got ", list.factors.size(), " factors and ", grads.size(),
        " gradients; give one of each.");
  for (size_t i = 0; i < grads.size(); ++i) {
    Factor& factor = list.factors[i];
    const Tensor& grad = grads[i];
    const ScalarType dtype = factor.is_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
    check(grad.dim() == 2 && grad.size(0) == factor.rows && grad.size(1) == factor.cols && grad.is_contiguous() &&
              grad.scalar_type() == dtype,
          "the gradient of factor ", i, " must be contiguous and have its shape and dtype.");
    factor.out = grad.mutable_data_ptr();
  }
  check_written_once(list);
}

// Elements of a piece of a shared allocation: each piece begins on a cache line.
inline int64_t piece_size(int64_t rows, int64_t cols) {
  constexpr int64_t kAlignment = 64;
  return (rows * cols + kAlignment - 1) / kAlignment * kAlignment;
}

inline Tensor piece(const Tensor& storage, int64_t rows, int64_t cols, int64_t offset) {
  const int64_t shape[2] = {rows, cols}, strides[2] = {cols, 1};
  AtenTensorHandle handle = nullptr;
  check(aoti_torch__reinterpret_tensor(storage.get(), 2, shape, strides, offset, &handle) == 0,
        "a gradient of ", rows, " x ", cols, " cannot be placed at element ", offset, ".");
  return Tensor(handle);
}

// Points `out` at new tensors like the factors, and returns those: pieces of one allocation for each dtype. Hundreds of
// small allocations would cost more than the arithmetic, and the allocator would give their pages back every time.
inline std::vector<Tensor> write_to_new(FactorList& list, const std::vector<Tensor>& factors) {
  int64_t sizes[2] = {0, 0};
  for (const Factor& factor : list.factors) sizes[factor.is_bfloat16] += piece_size(factor.rows, factor.cols);
  std::optional<Tensor> storage[2];
  int64_t used[2] = {0, 0};
  std::vector<Tensor> outputs;
  outputs.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    Factor& factor = list.factors[i];
    const int kind = factor.is_bfloat16;
    if (!storage[kind]) storage[kind] = torch::stable::new_empty(factors[i], {sizes[kind]});
    outputs.push_back(piece(*storage[kind], factor.rows, factor.cols, used[kind]));
    factor.out = outputs.back().mutable_data_ptr();
    used[kind] += piece_size(factor.rows, factor.cols);
  }
  return outputs;
}

// One allocation for all factors, which must share a dtype, or an empty one where it is not `wanted`.
inline Tensor new_storage(const FactorList& list, const std::vector<Tensor>& factors, bool wanted) {
  check(!factors.empty(), "give at least one factor.");
  int64_t size = 0;
  for (const Factor& factor : list.factors) {
    check(factor.is_bfloat16 == list.factors[0].is_bfloat16, "factors must share a dtype.");
    size += piece_size(factor.rows, factor.cols);
  }
  return torch::stable::new_empty(factors[0], {wanted ? size : 0});
}

// Points `out` at the pieces of what new_storage returned.
inline void write_to_pieces(FactorList& list, const Tensor& storage) {
  char* next = static_cast<char*>(storage.mutable_data_ptr());
  for (Factor& factor : list.factors) {
    factor.out = next;
    next += piece_size(factor.rows, factor.cols) * (factor.is_bfloat16 ? 2 : 4);
  }
}

// Those pieces as tensors; sides: rows and columns of every factor.
inline std::vector<Tensor> pieces(const Tensor& storage, const std::vector<int64_t>& sides) {
  std::vector<Tensor> result;
  result.reserve(sides.size() / 2);
  int64_t used = 0;
  for (size_t i = 0; i + 1 < sides.size(); i += 2) {
    const int64_t rows = sides[i], cols = sides[i + 1];
    check(rows >= 0 && cols >= 0 && (cols == 0 || rows <= storage.numel() / cols),
          "a piece of ", rows, " x ", cols, " does not fit in ", storage.numel(), " elements.");
    result.push_back(piece(storage, rows, cols, used));
    used += piece_size(rows, cols);
  }
  check(used == storage.numel(), "the pieces fill ", used, " of ", storage.numel(), " elements.");
  return result;
}

inline void check_group_vector(const Tensor& tensor, ScalarType dtype, int64_t n_groups, const char* name) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == n_groups,
        name, " must be contiguous, of the documented dtype and hold one entry per group (", n_groups, ").");
}

}  // namespace atp
