// What lies between the linears of a gated MLP: act(gate) * up and its gradients, in one pass over each matrix. The
// activation is SiLU, or GELU by its tanh.
//
// Rows may lie apart.

#include "column_sums.h"
#include "packed.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace atp::cpu {
namespace {

// Throws unless `values` has the shape and dtype of `gate` and rows without gaps.
void check_like(const Tensor& values, const char* name, const Tensor& gate) {
  check(values.dim() == 2 && values.size(0) == gate.size(0) && values.size(1) == gate.size(1) &&
            values.scalar_type() == gate.scalar_type(),
        name, " and gate must agree in shape and dtype.");
  check(values.stride(1) == 1, name, " must have contiguous rows.");
}

void check_gate(const Tensor& gate) {
  const ScalarType dtype = gate.scalar_type();
  check(gate.dim() == 2 && gate.stride(1) == 1, "gate must be 2-D with contiguous rows.");
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "gate must be float32 or bfloat16.");
}

// Rows of a matrix; T is const where they are only read.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;

  T* operator[](int64_t row) const { return first + row * stride; }
};

template <typename T>
Rows<const T> read(const Tensor& values) {
  return {static_cast<const T*>(values.const_data_ptr()), values.stride(0)};
}

template <typename T>
Rows<T> written(const Tensor& values) {
  return {static_cast<T*>(values.mutable_data_ptr()), values.stride(0)};
}

}  // namespace

void swiglu_into(const Tensor& gate, const Tensor& up, const Tensor& h, bool gelu) {
  check_gate(gate);
  check_like(up, "up", gate);
  check_like(h, "h", gate);
  check_apart(h, "h");
  const int64_t cols = gate.size(1);
  with_type(gate, [&](auto tag) {
    using T = decltype(tag);
    const auto g = read<T>(gate), u = read<T>(up);
    const auto to = written<T>(h);
    for_rows(gate.size(0), cols, [&](int64_t first, int64_t count) {
      const auto forward = activations_for<T>(loops(), gelu).swiglu_row;
      for (int64_t row = first; row < first + count; ++row) forward(g[row], u[row], cols, to[row]);
    });
  });
}

// d_gate may be d_h: an element is read before it is written.
//
// sums [samples, cols], if there are any: to the row of each sample the sums of d_gate * gate + d_up * up are added, which
// are the gradient of a mask of ones on gate and up in that sample.
void swiglu_backward(
    Tensor d_h, Tensor gate, Tensor up, Tensor d_gate, Tensor d_up, std::optional<Tensor> sums, bool gelu) {
  check_gate(gate);
  check_like(d_h, "d_h", gate);
  check_like(up, "up", gate);
  check_like(d_gate, "d_gate", gate);
  check_like(d_up, "d_up", gate);
  check_apart(d_gate, "d_gate");
  check_apart(d_up, "d_up");
  const int64_t cols = gate.size(1);
  with_type(gate, [&](auto tag) {
    using T = decltype(tag);
    const auto d = read<T>(d_h), g = read<T>(gate), u = read<T>(up);
    const auto to_gate = written<T>(d_gate), to_up = written<T>(d_up);
    if (sums.has_value()) {
      const int64_t samples = check_samples(*sums, gate.size(0), cols), rows = gate.size(0) / samples;
      for (int64_t i = 0; i < samples; ++i) {
        float* to = sums_of(*sums) + i * sums->stride(0);
        add_column_sums(rows, cols, to, [&](int64_t first, int64_t count, float* block) {
          const auto backward = activations_for<T>(loops(), gelu).swiglu_backward_dot_row;
          std::fill_n(block, cols, 0.0f);
          for (int64_t row = i * rows + first; row < i * rows + first + count; ++row) {
            backward(d[row], g[row], u[row], cols, to_gate[row], to_up[row], block);
          }
        });
      }
      return;
    }
    for_rows(gate.size(0), cols, [&](int64_t first, int64_t count) {
      const auto backward = activations_for<T>(loops(), gelu).swiglu_backward_row;
      for (int64_t row = first; row < first + count; ++row) {
        backward(d[row], g[row], u[row], cols, to_gate[row], to_up[row]);
      }
    });
  });
}

namespace {

Tensor swiglu_forward(Tensor gate, Tensor up, bool gelu) {
  check_gate(gate);
  Tensor h = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  swiglu_into(gate, up, h, gelu);
  return h;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&atp::cpu::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&atp::cpu::swiglu_backward));
}
