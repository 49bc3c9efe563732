// What the masked linear does around its matrix products: column masks, column sums and dropout, over a whole matrix.

#include "column_sums.h"
#include "packed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace atp::cpu {
namespace {

struct Matrix {
  int64_t rows;
  int64_t cols;
};

Matrix matrix(const Tensor& values, const char* name) {
  const ScalarType dtype = values.scalar_type();
  check(values.dim() == 2 && values.is_contiguous(), name, " must be 2-D and contiguous.");
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16.");
  return {values.size(0), values.size(1)};
}

Matrix pair(const Tensor& left, const Tensor& right) {
  const Matrix size = matrix(left, "left");
  matrix(right, "right");
  check(right.size(0) == size.rows && right.size(1) == size.cols && right.scalar_type() == left.scalar_type(),
        "left and right must agree in shape and dtype.");
  return size;
}

// A mask of float32 or bool as float32.
std::vector<float> widened(const Tensor& mask, int64_t cols) {
  const ScalarType dtype = mask.scalar_type();
  check((dtype == ScalarType::Float || dtype == ScalarType::Bool) && mask.is_contiguous() && mask.numel() == cols,
        "mask must be a contiguous float32 or bool vector of length ", cols, ".");
  std::vector<float> wide(cols);
  if (dtype == ScalarType::Float) {
    std::copy_n(static_cast<const float*>(mask.const_data_ptr()), cols, wide.begin());
  } else {
    std::copy_n(static_cast<const bool*>(mask.const_data_ptr()), cols, wide.begin());
  }
  return wide;
}

void write_masked(const Tensor& values, const Tensor& mask, void* result) {
  const Matrix size = matrix(values, "values");
  const std::vector<float> wide = widened(mask, size.cols);
  with_type(values, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(values.const_data_ptr());
    T* to = static_cast<T*>(result);
    for_rows(size.rows, size.cols, [&](int64_t first, int64_t count) {
      const int64_t at = first * size.cols;
      columns_for<T>(loops()).mask_rows(from + at, count, size.cols, wide.data(), to + at);
    });
  });
}

Tensor masked(Tensor values, Tensor mask) {
  Tensor result = torch::stable::empty_like(values);
  write_masked(values, mask, result.mutable_data_ptr());
  return result;
}

void mask_(Tensor values, Tensor mask) {
  write_masked(values, mask, values.mutable_data_ptr());
}

Tensor zeros(const Tensor& like, int64_t cols) {
  Tensor sums = torch::stable::new_empty(like, {cols}, ScalarType::Float);
  std::fill_n(sums_of(sums), cols, 0.0f);
  return sums;
}

// Adds the column sums of left * right over `size.rows` rows from `start` on.
template <typename T>
void add_dots(const Tensor& left, const Tensor& right, int64_t start, const Matrix& size, float* sums) {
  const T* a = static_cast<const T*>(left.const_data_ptr()) + start * size.cols;
  const T* b = static_cast<const T*>(right.const_data_ptr()) + start * size.cols;
  add_column_sums(size.rows, size.cols, sums, [&](int64_t first, int64_t count, float* out) {
    const int64_t at = first * size.cols;
    columns_for<T>(loops()).dot_rows(a + at, b + at, count, size.cols, out);
  });
}

Tensor column_dot(Tensor left, Tensor right) {
  const Matrix size = pair(left, right);
  Tensor sums = zeros(left, size.cols);
  with_type(left, [&](auto tag) { add_dots<decltype(tag)>(left, right, 0, size, sums_of(sums)); });
  return sums;
}

}  // namespace

void add_sample_dots(Tensor left, Tensor right, Tensor sums) {
  const Matrix size = pair(left, right);
  const int64_t samples = check_samples(sums, size.rows, size.cols);
  const Matrix each{size.rows / samples, size.cols};
  with_type(left, [&](auto tag) {
    for (int64_t i = 0; i < samples; ++i) {
      add_dots<decltype(tag)>(left, right, i * each.rows, each, sums_of(sums) + i * sums.stride(0));
    }
  });
}

namespace {

std::tuple<Tensor, Tensor> mask_and_dot(Tensor grad, Tensor total, Tensor mask) {
  const Matrix size = pair(grad, total);
  const std::vector<float> wide = widened(mask, size.cols);
  Tensor result = torch::stable::empty_like(grad);
  Tensor sums = zeros(grad, size.cols);
  with_type(grad, [&](auto tag) {
    using T = decltype(tag);
    const T* a = static_cast<const T*>(grad.const_data_ptr());
    const T* b = static_cast<const T*>(total.const_data_ptr());
    T* to = static_cast<T*>(result.mutable_data_ptr());
    add_column_sums(size.rows, size.cols, sums_of(sums), [&](int64_t first, int64_t count, float* out) {
      const int64_t at = first * size.cols;
      columns_for<T>(loops()).mask_and_dot_rows(a + at, b + at, count, size.cols, wide.data(), to + at, out);
    });
  });
  return {result, sums};
}

Tensor dropped(Tensor values, int64_t threshold, double scale, int64_t seed) {
  const Matrix size = matrix(values, "values");
  const uint64_t key = static_cast<uint64_t>(seed);
  const Drop drop{static_cast<uint32_t>(threshold), static_cast<float>(scale), static_cast<uint32_t>(key),
                  static_cast<uint32_t>(key >> 32)};
  Tensor result = torch::stable::empty_like(values);
  with_type(values, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(values.const_data_ptr());
    T* to = static_cast<T*>(result.mutable_data_ptr());
    for_rows(size.rows, size.cols, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t at = row * size.cols;
        columns_for<T>(loops()).drop_row(from + at, size.cols, static_cast<uint32_t>(row), drop, to + at);
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("masked", TORCH_BOX(&atp::cpu::masked));
  m.impl("mask_", TORCH_BOX(&atp::cpu::mask_));
  m.impl("column_dot", TORCH_BOX(&atp::cpu::column_dot));
  m.impl("add_sample_dots", TORCH_BOX(&atp::cpu::add_sample_dots));
  m.impl("mask_and_dot", TORCH_BOX(&atp::cpu::mask_and_dot));
  m.impl("dropped", TORCH_BOX(&atp::cpu::dropped));
}
