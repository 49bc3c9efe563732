// Matrix products by torch's BLAS, and views for them.
#pragma once

#include "rows.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>
#include <vector>

namespace atp::cpu {

// A view of `of`; strides and offset count elements, the offset from where `of` begins.
inline Tensor view(const Tensor& of, std::vector<int64_t> shape, std::vector<int64_t> strides, int64_t offset = 0) {
  int64_t begin = 0;
  AtenTensorHandle handle = nullptr;
  const bool made = aoti_torch_get_storage_offset(of.get(), &begin) == 0 &&
                    aoti_torch__reinterpret_tensor(of.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                   strides.data(), begin + offset, &handle) == 0;
  check(made, "a view of a tensor cannot be made.");
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

inline Tensor some_columns(const Tensor& matrix, int64_t first, int64_t count) {
  return view(matrix, {matrix.size(0), count}, {matrix.stride(0), matrix.stride(1)}, first * matrix.stride(1));
}

// [batch, rows, cols] -> [batch, cols, rows].
inline Tensor all_transposed(const Tensor& matrices) {
  return view(matrices, {matrices.size(0), matrices.size(2), matrices.size(1)},
              {matrices.stride(0), matrices.stride(2), matrices.stride(1)});
}

inline Tensor product(const Tensor& left, const Tensor& right) {
  Tensor out = torch::stable::new_empty(left, {left.size(0), right.size(1)});
  check(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()) == 0, "a matrix product failed.");
  return out;
}

// base + left right; a base [cols] is added to each row.
inline Tensor product(const Tensor& left, const Tensor& right, const Tensor& base) {
  Tensor out = torch::stable::new_empty(left, {left.size(0), right.size(1)});
  check(aoti_torch_cpu_addmm_out(out.get(), base.get(), left.get(), right.get(), 1.0, 1.0) == 0,
        "a matrix product failed.");
  return out;
}

inline Tensor all_products(const Tensor& left, const Tensor& right) {
  Tensor out = torch::stable::new_empty(left, {left.size(0), left.size(1), right.size(2)});
  check(aoti_torch_cpu_bmm_out(out.get(), left.get(), right.get()) == 0, "a matrix product failed.");
  return out;
}

// Copies rows of matrices of one dtype, whose rows may lie apart.
inline void copy_rows(const Tensor& from, const Tensor& to) {
  const int64_t rows = from.size(0), cols = from.size(1), width = cols * from.element_size();
  if (rows == 0 || cols == 0) return;  // their memory may be at no address, which memcpy must not be given
  const int64_t from_stride = from.stride(0) * from.element_size(), to_stride = to.stride(0) * to.element_size();
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  for_rows(rows, cols, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      std::memcpy(target + row * to_stride, source + row * from_stride, width);
    }
  });
}

}  // namespace atp::cpu
