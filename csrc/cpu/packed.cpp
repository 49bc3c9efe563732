// Packs: casts and copies of all factors in one call, products with what they stand beside, and their gradients taken
// apart again.

#include "packed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace atp::cpu {
namespace {

Layout layout_of(const std::vector<Tensor>& factors) {
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

// The gradients of the factors, float32, from those of what `load` wrote: d_down [R, in] and d_up [rows, R], of which
// each linear takes its own block.
void add_factor_grads(const Pack& pack, const Tensor& d_down, const Tensor& d_up, std::vector<Tensor>& grads) {
  const Layout& whole = pack.layout;
  const bfloat16* down = static_cast<const bfloat16*>(d_down.const_data_ptr());
  const bfloat16* up = static_cast<const bfloat16*>(d_up.const_data_ptr());
  for (size_t i = 0; i < whole.places.size(); ++i) {
    const Place place = whole.places[i];
    Tensor d_a = torch::stable::empty_like(pack.factors[2 * i]), d_b = torch::stable::empty_like(pack.factors[2 * i + 1]);
    float* a = static_cast<float*>(d_a.mutable_data_ptr());
    float* b = static_cast<float*>(d_b.mutable_data_ptr());
    for_rows(place.ranks, whole.inputs, [&](int64_t first, int64_t count) {
      const int64_t at = first * whole.inputs;
      widen_row(down + place.rank * whole.inputs + at, count * whole.inputs, static_cast<float>(pack.scaling), a + at);
    });
    for_rows(place.rows, place.ranks, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        widen_row(up + (place.row + row) * whole.ranks + place.rank, place.ranks, 1.0f, b + row * place.ranks);
      }
    });
    grads.push_back(std::move(d_a));
    grads.push_back(std::move(d_b));
  }
}

}  // namespace

void check_matrix(const Tensor& values, const char* name, int64_t rows, int64_t cols) {
  check(values.dim() == 2 && values.scalar_type() == ScalarType::BFloat16 && values.is_contiguous() &&
            values.size(0) == rows && values.size(1) == cols,
        name, " must be a contiguous bfloat16 matrix [", rows, ", ", cols, "].");
}

Pack::Pack(Tensor weight, Tensor down, std::optional<Tensor> bias, std::vector<Tensor> factors, double scaling)
    : weight(std::move(weight)),
      down(std::move(down)),
      bias(std::move(bias)),
      factors(std::move(factors)),
      scaling(scaling),
      layout(layout_of(this->factors)) {
  check_matrix(this->weight, "weight", layout.rows, width());
  check_matrix(this->down, "down", layout.ranks, layout.inputs);
  if (this->bias.has_value()) {
    check(this->bias->scalar_type() == ScalarType::BFloat16 && this->bias->numel() == layout.rows,
          "bias must be bfloat16 [", layout.rows, "].");
  }
}

// down becomes scaling * A of all linears, and the last columns of weight their B, each in the rows and columns of its
// own linear; the others are zero from the beginning.
void Pack::load() const {
  bfloat16* to_weight = static_cast<bfloat16*>(weight.mutable_data_ptr());
  bfloat16* to_down = static_cast<bfloat16*>(down.mutable_data_ptr());
  for (size_t i = 0; i < layout.places.size(); ++i) {
    const Place place = layout.places[i];
    const float* a = static_cast<const float*>(factors[2 * i].const_data_ptr());
    const float* b = static_cast<const float*>(factors[2 * i + 1].const_data_ptr());
    for_rows(place.ranks, layout.inputs, [&](int64_t first, int64_t count) {
      const int64_t at = first * layout.inputs;
      narrow_row(a + at, count * layout.inputs, static_cast<float>(scaling), to_down + place.rank * layout.inputs + at);
    });
    for_rows(place.rows, place.ranks, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        bfloat16* out = to_weight + (place.row + row) * width() + layout.inputs + place.rank;
        narrow_row(b + row * place.ranks, place.ranks, 1.0f, out);
      }
    });
  }
}

void Pack::complete(const Tensor& wide) const {
  copy_rows(product(x_of(wide), transposed(down)), s_of(wide));
}

Tensor Pack::forward(const Tensor& wide) const {
  return bias.has_value() ? product(wide, transposed(weight), *bias) : product(wide, transposed(weight));
}

std::optional<Tensor> Pack::backward(
    const Tensor& grad, const Tensor& wide, bool need_x, std::vector<Tensor>& grads) const {
  const Tensor d_wide = product(grad, weight);
  const Tensor d_s = torch::stable::new_empty(grad, {grad.size(0), layout.ranks});
  copy_rows(s_of(d_wide), d_s);
  add_factor_grads(*this, product(transposed(d_s), x_of(wide)), product(transposed(grad), s_of(wide)), grads);
  if (!need_x) return std::nullopt;
  return product(d_s, down, x_of(d_wide));
}

std::tuple<Tensor, Tensor> run(const Pack& pack, const Tensor& x, const std::optional<Around>& around, double eps) {
  if (!around.has_value()) check_matrix(x, "x", x.size(0), pack.layout.inputs);
  pack.load();
  Tensor wide = torch::stable::new_empty(x, {x.size(0), pack.width()}, ScalarType::BFloat16);
  around.has_value() ? around->enter(wide, eps) : copy_rows(x, pack.x_of(wide));
  pack.complete(wide);
  return {pack.forward(wide), wide};
}

std::vector<Tensor> run_back(const Pack& pack, const Tensor& grad, const Tensor& wide, bool need_x) {
  check_matrix(grad, "grad", grad.size(0), pack.layout.rows);
  check_matrix(wide, "wide", grad.size(0), pack.width());
  std::vector<Tensor> grads{grad};
  const std::optional<Tensor> d_x = pack.backward(grad, wide, need_x, grads);
  grads[0] = d_x.has_value() ? *d_x : torch::stable::new_empty(grad, {0});
  return grads;
}

void Around::enter(const Tensor& wide, double eps) const {
  const int64_t cols = x.size(1), stride = wide.stride(0);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  const float* factors = static_cast<const float*>(weight.const_data_ptr());
  float* scale = static_cast<float*>(scales.mutable_data_ptr());
  bfloat16* to = static_cast<bfloat16*>(wide.mutable_data_ptr());
  for_rows(x.size(0), cols, [&](int64_t first, int64_t count) {
    const auto body = norm_for<float, bfloat16>(loops()).rms_norm_row;
    for (int64_t row = first; row < first + count; ++row) {
      scale[row] = body(from + row * cols, factors, eps, cols, to + row * stride);
    }
  });
}

Tensor Around::leave(const Tensor& y) const {
  const int64_t cols = x.size(1);
  Tensor sum = torch::stable::empty_like(x);
  const float* stream = static_cast<const float*>(x.const_data_ptr());
  const bfloat16* added = static_cast<const bfloat16*>(y.const_data_ptr());
  float* to = static_cast<float*>(sum.mutable_data_ptr());
  for_rows(x.size(0), cols, [&](int64_t first, int64_t count) {
    for (int64_t i = first * cols; i < (first + count) * cols; ++i) to[i] = stream[i] + widened(added[i]);
  });
  return sum;
}

Tensor Around::back(const Tensor& grad, const Tensor& d_normed) const {
  const int64_t cols = x.size(1);
  Tensor d_x = torch::stable::empty_like(x);
  const float* stream = static_cast<const float*>(x.const_data_ptr());
  const float* factors = static_cast<const float*>(weight.const_data_ptr());
  const float* scale = static_cast<const float*>(scales.const_data_ptr());
  const float* passed = static_cast<const float*>(grad.const_data_ptr());
  const bfloat16* upstream = static_cast<const bfloat16*>(d_normed.const_data_ptr());
  float* to = static_cast<float*>(d_x.mutable_data_ptr());
  for_rows(x.size(0), cols, [&](int64_t first, int64_t count) {
    const auto body = norm_for<float, bfloat16>(loops()).rms_norm_backward_row;
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t at = row * cols;
      body(upstream + at, stream + at, factors, scale[row], cols, to + at);
      for (int64_t i = at; i < at + cols; ++i) to[i] += passed[i];
    }
  });
  return d_x;
}

Tensor narrow(const Tensor& values) {
  check(values.dim() == 2 && values.is_contiguous() && values.scalar_type() == ScalarType::Float,
        "grad must be contiguous float32.");
  Tensor result = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::BFloat16);
  const int64_t cols = values.size(1);
  const float* from = static_cast<const float*>(values.const_data_ptr());
  bfloat16* to = static_cast<bfloat16*>(result.mutable_data_ptr());
  for_rows(values.size(0), cols, [&](int64_t first, int64_t count) {
    narrow_row(from + first * cols, count * cols, 1.0f, to + first * cols);
  });
  return result;
}

Packs::Packs(Tensor w1, Tensor d1, std::optional<Tensor> b1, Tensor w2, Tensor d2, std::optional<Tensor> b2,
             const std::vector<Tensor>& factors, double s1, double s2)
    : first(w1, d1, b1, {factors.begin(), factors.end() - std::min<size_t>(2, factors.size())}, s1),
      last(w2, d2, b2, {factors.end() - std::min<size_t>(2, factors.size()), factors.end()}, s2) {}

namespace {

Around fitting(const Packs& packs, int64_t rows, Around around) {
  const int64_t cols = packs.first.layout.inputs;
  check(packs.last.layout.rows == cols, "a block under a norm must write as many columns as it reads.");
  for (const Tensor* part : {&around.x, &around.weight, &around.scales}) {
    check(part->scalar_type() == ScalarType::Float && part->is_contiguous(),
          "x, norm and scales must be contiguous float32.");
  }
  check(around.x.dim() == 2 && around.x.size(0) == rows && around.x.size(1) == cols && around.weight.numel() == cols &&
            around.scales.numel() == rows,
        "x [", rows, ", ", cols, "], norm and scales must have the rows and columns of the block.");
  return around;
}

}  // namespace

std::optional<Around> around_forward(const Packs& packs, const Tensor& x, const std::optional<Tensor>& norm) {
  if (!norm.has_value()) return std::nullopt;
  return fitting(packs, x.size(0), {x, *norm, torch::stable::new_empty(*norm, {x.size(0)}, ScalarType::Float)});
}

std::optional<Around> around_backward(
    const Packs& packs, int64_t rows, const std::optional<Tensor>& x, const std::optional<Tensor>& norm,
    const std::optional<Tensor>& scales) {
  if (!norm.has_value()) return std::nullopt;
  check(x.has_value() && scales.has_value(), "a norm needs its x and its scales.");
  return fitting(packs, rows, {*x, *norm, *scales});
}

Tensor left(const std::optional<Around>& around, Tensor y) { return around.has_value() ? around->leave(y) : y; }

Tensor scales_of(const std::optional<Around>& around, const Tensor& like) {
  return around.has_value() ? around->scales : torch::stable::new_empty(like, {0}, ScalarType::Float);
}

namespace {

std::tuple<Tensor, Tensor> packed_forward(
    Tensor x, Tensor weight, Tensor down, std::optional<Tensor> bias, std::vector<Tensor> factors, double scaling) {
  return run(Pack(weight, down, bias, factors, scaling), x);
}

std::vector<Tensor> packed_backward(
    Tensor grad, Tensor wide, Tensor weight, Tensor down, std::vector<Tensor> factors, double scaling, bool need_x) {
  return run_back(Pack(weight, down, std::nullopt, factors, scaling), grad, wide, need_x);
}

// The columns of gate and of up in what the first pack of a gated MLP writes.
std::pair<Tensor, Tensor> gate_and_up(const Tensor& both) {
  const int64_t half = both.size(1) / 2;
  return {some_columns(both, 0, half), some_columns(both, half, half)};
}

void check_mlp(const Packs& packs) {
  check(packs.first.layout.places.size() == 2 && packs.first.layout.rows == 2 * packs.last.layout.inputs,
        "the packs must be gate and up, and down that reads as many channels.");
}

// (y, [x, S], gate and up, S of down, scales of the norm or nothing) for factors of gate, up and down. With a norm of
// this weight, y is x + block(norm(x)).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_mlp_forward(
    Tensor x, Tensor w1, Tensor d1, std::optional<Tensor> b1, Tensor w2, Tensor d2, std::optional<Tensor> b2,
    std::vector<Tensor> factors, double s1, double s2, bool gelu, std::optional<Tensor> norm, double eps) {
  const Packs packs(w1, d1, b1, w2, d2, b2, factors, s1, s2);
  check_mlp(packs);
  const std::optional<Around> around = around_forward(packs, x, norm);
  auto [both, wide] = run(packs.first, x, around, eps);
  packs.last.load();
  const auto [gate, up] = gate_and_up(both);
  const Tensor hidden = torch::stable::new_empty(wide, {x.size(0), packs.last.width()});
  swiglu_into(gate, up, packs.last.x_of(hidden), gelu);
  packs.last.complete(hidden);
  Tensor s = torch::stable::new_empty(wide, {x.size(0), packs.last.layout.ranks});
  copy_rows(packs.last.s_of(hidden), s);
  return {left(around, packs.last.forward(hidden)), wide, both, s, scales_of(around, wide)};
}

// The gradient of x, empty where it is not wanted, and those of the factors of gate, up and down. What down reads is made
// again. sums as in `swiglu_backward`; x, norm and scales where there was a norm.
std::vector<Tensor> packed_mlp_backward(
    Tensor grad, Tensor wide, Tensor both, Tensor s, Tensor w1, Tensor d1, Tensor w2, Tensor d2,
    std::vector<Tensor> factors, double s1, double s2, bool gelu, bool need_x, std::optional<Tensor> sums,
    std::optional<Tensor> x, std::optional<Tensor> norm, std::optional<Tensor> scales) {
  const Packs packs(w1, d1, std::nullopt, w2, d2, std::nullopt, factors, s1, s2);
  check_mlp(packs);
  const int64_t rows = grad.size(0);
  const std::optional<Around> around = around_backward(packs, rows, x, norm, scales);
  const Tensor d_y = around.has_value() ? narrow(grad) : grad;
  check_matrix(d_y, "grad", rows, packs.last.layout.rows);
  check_matrix(wide, "wide", rows, packs.first.width());
  check_matrix(both, "both", rows, packs.first.layout.rows);
  check_matrix(s, "s", rows, packs.last.layout.ranks);
  const auto [gate, up] = gate_and_up(both);
  std::vector<Tensor> of_last;
  const Tensor d_both = torch::stable::empty_like(both);
  {
    const Tensor hidden = torch::stable::new_empty(d_y, {rows, packs.last.width()});
    swiglu_into(gate, up, packs.last.x_of(hidden), gelu);
    copy_rows(s, packs.last.s_of(hidden));
    const Tensor d_h = *packs.last.backward(d_y, hidden, true, of_last);
    const auto [d_gate, d_up] = gate_and_up(d_both);
    swiglu_backward(d_h, gate, up, d_gate, d_up, sums, gelu);
  }
  std::vector<Tensor> grads = run_back(packs.first, d_both, wide, need_x);
  if (need_x && around.has_value()) grads[0] = around->back(grad, grads[0]);
  grads.insert(grads.end(), of_last.begin(), of_last.end());
  return grads;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("packed_forward", TORCH_BOX(&atp::cpu::packed_forward));
  m.impl("packed_backward", TORCH_BOX(&atp::cpu::packed_backward));
  m.impl("packed_mlp_forward", TORCH_BOX(&atp::cpu::packed_mlp_forward));
  m.impl("packed_mlp_backward", TORCH_BOX(&atp::cpu::packed_mlp_backward));
}
