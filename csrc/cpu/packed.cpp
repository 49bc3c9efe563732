// The factors of several adapters beside their frozen weights, and their gradients taken apart again: a cast and a copy
// of each, in one call for all.

#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

namespace atp::cpu {
namespace {

// Where the factors of one linear lie: rows of `weight` from `row` on, and columns of the adapters from `rank` on.
struct Place {
  int64_t row;
  int64_t rows;
  int64_t rank;
  int64_t ranks;
};

struct Layout {
  std::vector<Place> places;
  int64_t inputs;
  int64_t rows;
  int64_t ranks;
};

Layout layout(const std::vector<Tensor>& factors) {
  check(!factors.empty() && factors.size() % 2 == 0, "factors must be pairs of lora_a and lora_b.");
  check(factors[0].dim() == 2, "factors must be lora_a [r, in] and lora_b [out, r] of one input.");
  Layout found{{}, factors[0].size(1), 0, 0};
  for (size_t i = 0; i < factors.size(); i += 2) {
    const Tensor &a = factors[i], &b = factors[i + 1];
    check(a.dim() == 2 && b.dim() == 2 && a.size(1) == found.inputs && b.size(1) == a.size(0),
          "factors must be lora_a [r, in] and lora_b [out, r] of one input.");
    check(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float && a.is_contiguous() &&
              b.is_contiguous(),
          "factors must be contiguous float32.");
    found.places.push_back({found.rows, b.size(0), found.ranks, a.size(0)});
    found.rows += b.size(0);
    found.ranks += a.size(0);
  }
  return found;
}

void check_matrix(const Tensor& values, const char* name, int64_t rows, int64_t cols) {
  check(values.dim() == 2 && values.scalar_type() == ScalarType::BFloat16 && values.is_contiguous() &&
            values.size(0) == rows && values.size(1) == cols,
        name, " must be a contiguous bfloat16 matrix [", rows, ", ", cols, "].");
}

inline uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : even);
}

inline float widened(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void narrow_row(const float* from, int64_t count, float scale, bfloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = narrowed(from[i] * scale);
}

void widen_row(const bfloat16* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]) * scale;
}

// down [R, in] becomes scaling * A of all linears, and the last R columns of weight [rows, in + R] their B, each in the
// rows and columns of its own linear; the others are zero from the beginning.
void load_factors(Tensor weight, Tensor down, std::vector<Tensor> factors, double scaling) {
  const Layout whole = layout(factors);
  const int64_t width = whole.inputs + whole.ranks;
  check_matrix(weight, "weight", whole.rows, width);
  check_matrix(down, "down", whole.ranks, whole.inputs);
  bfloat16* to_weight = static_cast<bfloat16*>(weight.mutable_data_ptr());
  bfloat16* to_down = static_cast<bfloat16*>(down.mutable_data_ptr());
  for (size_t i = 0; i < whole.places.size(); ++i) {
    const Place place = whole.places[i];
    const float* a = static_cast<const float*>(factors[2 * i].const_data_ptr());
    const float* b = static_cast<const float*>(factors[2 * i + 1].const_data_ptr());
    for_rows(place.ranks, whole.inputs, [&](int64_t first, int64_t count) {
      const int64_t at = first * whole.inputs;
      narrow_row(a + at, count * whole.inputs, static_cast<float>(scaling), to_down + place.rank * whole.inputs + at);
    });
    for_rows(place.rows, place.ranks, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        bfloat16* out = to_weight + (place.row + row) * width + whole.inputs + place.rank;
        narrow_row(b + row * place.ranks, place.ranks, 1.0f, out);
      }
    });
  }
}

// The gradients of the factors, float32, from those of what `load_factors` wrote: d_down [R, in] and d_up [rows, R], of
// which each linear takes its own block.
std::vector<Tensor> factor_grads(Tensor d_down, Tensor d_up, std::vector<Tensor> factors, double scaling) {
  const Layout whole = layout(factors);
  check_matrix(d_down, "d_down", whole.ranks, whole.inputs);
  check_matrix(d_up, "d_up", whole.rows, whole.ranks);
  const bfloat16* down = static_cast<const bfloat16*>(d_down.const_data_ptr());
  const bfloat16* up = static_cast<const bfloat16*>(d_up.const_data_ptr());
  std::vector<Tensor> grads;
  for (size_t i = 0; i < whole.places.size(); ++i) {
    const Place place = whole.places[i];
    grads.push_back(torch::stable::empty_like(factors[2 * i]));
    grads.push_back(torch::stable::empty_like(factors[2 * i + 1]));
    float* a = static_cast<float*>(grads[2 * i].mutable_data_ptr());
    float* b = static_cast<float*>(grads[2 * i + 1].mutable_data_ptr());
    for_rows(place.ranks, whole.inputs, [&](int64_t first, int64_t count) {
      const int64_t at = first * whole.inputs;
      widen_row(down + place.rank * whole.inputs + at, count * whole.inputs, static_cast<float>(scaling), a + at);
    });
    for_rows(place.rows, place.ranks, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        widen_row(up + (place.row + row) * whole.ranks + place.rank, place.ranks, 1.0f, b + row * place.ranks);
      }
    });
  }
  return grads;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("load_factors", TORCH_BOX(&atp::cpu::load_factors));
  m.impl("factor_grads", TORCH_BOX(&atp::cpu::factor_grads));
}
