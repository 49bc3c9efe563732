// Group lasso and its proximal step over all factors of a model in one call.
//
// Every slot is summed by one thread in a fixed order, and slots are added to their groups in the order of the factors,
// so no result depends on the number of threads.

#include "../factors.h"
#include "loops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <tuple>

namespace atp::cpu {
namespace {

// Elements a thread takes at once: large against the cost of a task, small against the second-level cache.
constexpr int64_t kTileElements = 16384;
constexpr int64_t kMinTileColumns = 64;

struct Tile {
  const Factor* factor;
  int64_t begin;  // slots of the factor
  int64_t end;
};

std::vector<Tile> tiles(const FactorList& list) {
  std::vector<Tile> result;
  for (const Factor& factor : list.factors) {
    const int64_t across = std::max<int64_t>(1, factor.by_row ? factor.cols : factor.rows);
    const int64_t step = std::max(kTileElements / across, factor.by_row ? int64_t{1} : kMinTileColumns);
    for (int64_t begin = 0; begin < factor.slots(); begin += step) {
      result.push_back({&factor, begin, std::min(begin + step, factor.slots())});
    }
  }
  return result;
}

// Calls body(tile, type tag) for every tile, on torch's own threads.
template <typename Body>
void for_each_tile(const FactorList& list, const Body& body) {
  const std::vector<Tile> work = tiles(list);
  torch::stable::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (work[i].factor->is_bfloat16) {
        body(work[i], bfloat16{});
      } else {
        body(work[i], float{});
      }
    }
  });
}

void check_ids(const FactorList& list, int64_t n_groups) {
  for (size_t i = 0; i < list.factors.size(); ++i) {
    const Factor& factor = list.factors[i];
    bool outside = false;
    for (int64_t slot = 0; slot < factor.slots(); ++slot) {
      outside |= static_cast<uint64_t>(factor.index[slot]) >= static_cast<uint64_t>(n_groups);  // catches negative ids
    }
    check(!outside, "index of factor ", i, " has a group id outside [0, ", n_groups, ").");
  }
}

// Sum of squares of every group, and which groups own anything.
struct GroupSquares {
  std::vector<double> sum;
  std::vector<uint8_t> owned;
};

GroupSquares group_squares(const FactorList& list, int64_t n_groups) {
  const std::unique_ptr<float[]> slots(new float[list.slots]);
  const Loops& set = loops();
  for_each_tile(list, [&](const Tile& tile, auto tag) {
    using T = decltype(tag);
    const Factor& factor = *tile.factor;
    const T* data = static_cast<const T*>(factor.data);
    float* out = slots.get() + factor.first_slot + tile.begin;
    const int64_t count = tile.end - tile.begin;
    if (factor.by_row) {
      loops_for<T>(set).row_squares(data + tile.begin * factor.cols, count, factor.cols, out);
    } else {
      loops_for<T>(set).column_squares(data + tile.begin, factor.rows, count, factor.cols, out);
    }
  });
  GroupSquares squares{std::vector<double>(n_groups), std::vector<uint8_t>(n_groups)};
  for (const Factor& factor : list.factors) {
    const float* from = slots.get() + factor.first_slot;
    for (int64_t slot = 0; slot < factor.slots(); ++slot) {
      squares.sum[factor.index[slot]] += from[slot];
      squares.owned[factor.index[slot]] = 1;
    }
  }
  return squares;
}

// out = x * scale of its group.
void scale_by_group(const FactorList& list, const std::vector<float>& group_scale) {
  const std::unique_ptr<float[]> slots(new float[list.slots]);
  const Loops& set = loops();
  for_each_tile(list, [&](const Tile& tile, auto tag) {
    using T = decltype(tag);
    const Factor& factor = *tile.factor;
    float* scale = slots.get() + factor.first_slot + tile.begin;
    const int64_t count = tile.end - tile.begin;
    for (int64_t i = 0; i < count; ++i) scale[i] = group_scale[factor.index[tile.begin + i]];
    const int64_t start = tile.begin * (factor.by_row ? factor.cols : 1);
    const T* data = static_cast<const T*>(factor.data) + start;
    T* out = static_cast<T*>(factor.out) + start;
    if (factor.by_row) {
      loops_for<T>(set).scale_rows(data, count, factor.cols, scale, out);
    } else {
      loops_for<T>(set).scale_columns(data, factor.rows, count, factor.cols, scale, out);
    }
  });
}

std::tuple<Tensor, Tensor> group_lasso_forward(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    std::vector<Tensor> index,
    Tensor removed,
    double eps,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  const FactorList list = describe(factors, axes, index);
  check_ids(list, n_groups);
  const GroupSquares squares = group_squares(list, n_groups);

  Tensor value = torch::stable::new_empty(removed, {}, ScalarType::Float);
  Tensor norms = torch::stable::new_empty(removed, {n_groups}, ScalarType::Float);
  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  float* norm = static_cast<float*>(norms.mutable_data_ptr());
  double total = 0;
  for (int64_t group = 0; group < n_groups; ++group) {
    const double exact = std::sqrt(squares.sum[group] + eps);
    norm[group] = static_cast<float>(exact);
    if (is_removed[group] && squares.owned[group]) total += exact;
  }
  *static_cast<float*>(value.mutable_data_ptr()) = static_cast<float>(total);
  return {value, norms};
}

std::vector<Tensor> group_lasso_backward(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    std::vector<Tensor> index,
    Tensor removed,
    Tensor norms,
    Tensor grad_out,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(norms, ScalarType::Float, n_groups, "norms");
  check(grad_out.scalar_type() == ScalarType::Float && grad_out.numel() == 1, "grad_out must be one float32.");
  FactorList list = describe(factors, axes, index);
  check_ids(list, n_groups);

  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  const float* norm = static_cast<const float*>(norms.const_data_ptr());
  const float upstream = *static_cast<const float*>(grad_out.const_data_ptr());
  std::vector<float> slope(n_groups);
  for (int64_t group = 0; group < n_groups; ++group) {
    // At the origin (possible only with eps = 0) zero is the subgradient of least norm.
    slope[group] = is_removed[group] && norm[group] != 0 ? upstream / norm[group] : 0.0f;
  }
  std::vector<Tensor> grads = write_to_new(list, factors);
  scale_by_group(list, slope);
  return grads;
}

void group_prox_(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    std::vector<Tensor> index,
    Tensor removed,
    Tensor threshold,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(threshold, ScalarType::Float, n_groups, "threshold");
  FactorList list = describe(factors, axes, index);
  check_ids(list, n_groups);
  write_in_place(list);

  const GroupSquares squares = group_squares(list, n_groups);
  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  const float* limit = static_cast<const float*>(threshold.const_data_ptr());
  std::vector<float> scale(n_groups, 1.0f);
  for (int64_t group = 0; group < n_groups; ++group) {
    if (!is_removed[group]) continue;
    const double norm = std::sqrt(squares.sum[group]);
    scale[group] = norm <= limit[group] ? 0.0f : static_cast<float>(1 - limit[group] / norm);
  }
  scale_by_group(list, scale);
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("group_lasso_forward", TORCH_BOX(&atp::cpu::group_lasso_forward));
  m.impl("group_lasso_backward", TORCH_BOX(&atp::cpu::group_lasso_backward));
  m.impl("group_prox_", TORCH_BOX(&atp::cpu::group_prox_));
}
