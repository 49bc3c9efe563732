// RMSNorm of rows and its gradient, from one dtype to another where autocast would cast the result.

#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace atp::cpu {
namespace {

void check_rows(const Tensor& values, const char* name, int64_t rows, int64_t cols) {
  const ScalarType dtype = values.scalar_type();
  check(values.dim() == 2 && values.is_contiguous() && values.size(0) == rows && values.size(1) == cols, name,
        " must be contiguous [", rows, ", ", cols, "].");
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " must be float32 or bfloat16.");
}

void check_vector(const Tensor& values, const char* name, int64_t size) {
  check(values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.numel() == size, name,
        " must be a contiguous float32 vector of length ", size, ".");
}

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps, bool narrow) {
  check(x.dim() == 2 && x.size(1) > 0, "x must be 2-D and not empty.");
  const int64_t rows = x.size(0), cols = x.size(1);
  check_rows(x, "x", rows, cols);
  check_vector(weight, "weight", cols);
  const ScalarType dtype = narrow ? ScalarType::BFloat16 : x.scalar_type();
  Tensor y = torch::stable::new_empty(x, {rows, cols}, dtype);
  Tensor scales = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const float* factors = static_cast<const float*>(weight.const_data_ptr());
  float* scale = static_cast<float*>(scales.mutable_data_ptr());
  with_type(x, [&](auto tag) {
    with_type(y, [&](auto result) {
      using X = decltype(tag);
      using Y = decltype(result);
      const X* from = static_cast<const X*>(x.const_data_ptr());
      Y* to = static_cast<Y*>(y.mutable_data_ptr());
      for_rows(rows, cols, [&](int64_t first, int64_t count) {
        const auto body = norm_for<X, Y>(loops()).rms_norm_row;
        for (int64_t row = first; row < first + count; ++row) {
          scale[row] = body(from + row * cols, factors, eps, cols, to + row * cols);
        }
      });
    });
  });
  return {y, scales};
}

Tensor rms_norm_backward(Tensor d_y, Tensor x, Tensor weight, Tensor scales) {
  check(x.dim() == 2 && x.size(1) > 0, "x must be 2-D and not empty.");
  const int64_t rows = x.size(0), cols = x.size(1);
  check_rows(x, "x", rows, cols);
  check_rows(d_y, "d_y", rows, cols);
  check_vector(weight, "weight", cols);
  check_vector(scales, "scales", rows);
  Tensor d_x = torch::stable::empty_like(x);
  const float* factors = static_cast<const float*>(weight.const_data_ptr());
  const float* scale = static_cast<const float*>(scales.const_data_ptr());
  with_type(x, [&](auto tag) {
    with_type(d_y, [&](auto result) {
      using X = decltype(tag);
      using Y = decltype(result);
      const X* from = static_cast<const X*>(x.const_data_ptr());
      const Y* upstream = static_cast<const Y*>(d_y.const_data_ptr());
      X* to = static_cast<X*>(d_x.mutable_data_ptr());
      for_rows(rows, cols, [&](int64_t first, int64_t count) {
        const auto body = norm_for<X, Y>(loops()).rms_norm_backward_row;
        for (int64_t row = first; row < first + count; ++row) {
          const int64_t at = row * cols;
          body(upstream + at, from + at, factors, scale[row], cols, to + at);
        }
      });
    });
  });
  return d_x;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&atp::cpu::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&atp::cpu::rms_norm_backward));
}
