// Group lasso and its proximal step over all factors of a model in one call.
//
// Every slot is summed by one thread in a fixed order, and slots are added to their groups in the order of the factors,
// so no result depends on the number of threads.

#include "../factors.h"
#include "loops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>

namespace atp::cpu {
namespace {

// Elements of a tile: large against the cost of a call, small against the second-level cache. No tile has more slots.
constexpr int64_t kTileElements = 16384;
constexpr int64_t kMinTileColumns = 64;
// Groups that are summed together; the value of the lasso is the sum of such blocks, whoever summed them.
constexpr int64_t kGroupBlock = 1024;

struct Tile {
  const Factor* factor;
  int64_t begin;  // slots of the factor
  int64_t end;
  int64_t first_element;  // counted over all tiles
  size_t number;
};

// The tile's last slot: with `whole_groups`, whose slots lie next to each other, no group begun in it is left unfinished.
int64_t tile_end(const Factor& factor, int64_t begin, int64_t step, bool whole_groups) {
  int64_t end = std::min(begin + step, factor.slots());
  while (whole_groups && end < factor.slots() && factor.index[end] == factor.index[end - 1]) ++end;
  return end;
}

std::vector<Tile> tiles(const FactorList& list, bool whole_groups = false) {
  std::vector<Tile> result;
  int64_t elements = 0;
  for (const Factor& factor : list.factors) {
    const int64_t across = std::max<int64_t>(1, factor.by_row ? factor.cols : factor.rows);
    const int64_t step = std::max(kTileElements / across, factor.by_row ? int64_t{1} : kMinTileColumns);
    for (int64_t begin = 0, end; begin < factor.slots(); begin = end) {
      end = tile_end(factor, begin, step, whole_groups);
      result.push_back({&factor, begin, end, elements, result.size()});
      elements += (end - begin) * across;
    }
  }
  result.push_back({nullptr, 0, 0, elements, result.size()});
  return result;
}

// Tiles with all slots of their groups, or no tiles where a group has more slots than a tile may have.
std::vector<Tile> tiles_of_runs(const FactorList& list) {
  std::vector<Tile> work = tiles(list, true);
  const auto fits = [](const Tile& tile) { return tile.end - tile.begin <= kTileElements; };
  return std::all_of(work.begin(), work.end(), fits) ? work : std::vector<Tile>();
}

// Calls body(tile, type tag) for every tile on torch's threads, which share the elements equally: a tile goes to the
// thread whose share holds its first element.
template <typename Body>
void for_each_tile(const std::vector<Tile>& work, const Body& body) {
  torch::stable::parallel_for(0, work.back().first_element, kTileElements, [&](int64_t begin, int64_t end) {
    const auto starts_before = [](const Tile& tile, int64_t element) { return tile.first_element < element; };
    auto tile = std::lower_bound(work.begin(), work.end() - 1, begin, starts_before);
    for (; tile->first_element < end; ++tile) {
      if (tile->factor->is_bfloat16) {
        body(*tile, bfloat16{});
      } else {
        body(*tile, float{});
      }
    }
  });
}

// Sum of squares of every slot of a tile.
template <typename T>
void tile_squares(const Tile& tile, float* out) {
  const Factor& factor = *tile.factor;
  const T* data = static_cast<const T*>(factor.data);
  const int64_t count = tile.end - tile.begin;
  if (factor.by_row) {
    loops_for<T>(loops()).row_squares(data + tile.begin * factor.cols, count, factor.cols, out);
  } else {
    loops_for<T>(loops()).column_squares(data + tile.begin, factor.rows, count, factor.cols, out);
  }
}

// out = x * scale of its slot, or out += that, for the slots of a tile.
template <typename T>
void scale_tile(const Tile& tile, const float* scale, bool add = false) {
  const Factor& factor = *tile.factor;
  const GroupLoops<T>& group = loops_for<T>(loops());
  const int64_t count = tile.end - tile.begin;
  const int64_t start = tile.begin * (factor.by_row ? factor.cols : 1);
  const T* data = static_cast<const T*>(factor.data) + start;
  T* out = static_cast<T*>(factor.out) + start;
  if (factor.by_row) {
    (add ? group.add_scaled_rows : group.scale_rows)(data, count, factor.cols, scale, out);
  } else {
    (add ? group.add_scaled_columns : group.scale_columns)(data, factor.rows, count, factor.cols, scale, out);
  }
}

// Sum of squares of every slot.
std::unique_ptr<float[]> slot_squares(const FactorList& list) {
  std::unique_ptr<float[]> squares(new float[list.slots]);
  for_each_tile(tiles(list), [&](const Tile& tile, auto tag) {
    tile_squares<decltype(tag)>(tile, squares.get() + tile.factor->first_slot + tile.begin);
  });
  return squares;
}

// Calls body(first group, number of groups, their sums of squares) for every block of groups.
template <typename Body>
void for_each_group_block(const FactorList& list, const GroupSlots& slots, int64_t n_groups, const Body& body) {
  const std::unique_ptr<float[]> squares = slot_squares(list);
  const int64_t n_blocks = (n_groups + kGroupBlock - 1) / kGroupBlock;
  torch::stable::parallel_for(0, n_blocks, 4, [&](int64_t begin, int64_t end) {
    double sums[kGroupBlock];
    for (int64_t first = begin * kGroupBlock; first < std::min(end * kGroupBlock, n_groups); first += kGroupBlock) {
      const int64_t count = std::min(kGroupBlock, n_groups - first);
      loops().group_sums(squares.get(), slots.order, slots.starts + first, count, sums);
      body(first, count, sums);
    }
  });
}

// out = x * scale of its slot, or out += that, where fill(index, count, scale) looks up the scales of `count` slots.
template <typename Fill>
void scale_slots(const FactorList& list, const Fill& fill, bool add = false) {
  for_each_tile(tiles(list), [&](const Tile& tile, auto tag) {
    float scale[kTileElements];
    fill(tile.factor->index + tile.begin, tile.end - tile.begin, scale);
    scale_tile<decltype(tag)>(tile, scale, add);
  });
}

// The lasso, and sqrt(sum of squares + eps) of every group: body(first group, number of groups) sees a block of them.
template <typename Body>
double group_norms(
    const FactorList& list, const GroupSlots& slots, int64_t n_groups, const bool* removed, double eps, float* norm,
    const Body& body) {
  std::vector<double> totals(n_groups / kGroupBlock + 1);
  for_each_group_block(list, slots, n_groups, [&](int64_t first, int64_t count, const double* sums) {
    totals[first / kGroupBlock] =
        loops().group_norms(sums, slots.starts + first, removed + first, count, eps, norm + first);
    body(first, count);
  });
  return std::accumulate(totals.begin(), totals.end(), 0.0);
}

// The lasso of tiles that hold whole groups, whose norms slopes_of(tile, squares of slots, slopes of slots) sums up. While
// a tile is in the cache the gradient is written or added where `out` of its factor points, unless that is nowhere:
// factors are read from memory once.
template <typename SlopesOf>
double lasso_in_one_sweep(const std::vector<Tile>& work, bool add, const SlopesOf& slopes_of) {
  std::vector<double> totals(work.size());
  for_each_tile(work, [&](const Tile& tile, auto tag) {
    float squares[kTileElements], slopes[kTileElements];
    tile_squares<decltype(tag)>(tile, squares);
    totals[tile.number] = slopes_of(tile, squares, slopes);
    if (tile.factor->out != nullptr) scale_tile<decltype(tag)>(tile, slopes, add);
  });
  return std::accumulate(totals.begin(), totals.end(), 0.0);
}

// Slots are groups of their own.
double separate_lasso(const FactorList& list, const bool* removed, double eps, float upstream, bool add) {
  return lasso_in_one_sweep(tiles(list), add, [&](const Tile& tile, const float* squares, float* slopes) {
    const bool* flags = removed + tile.factor->first_slot + tile.begin;
    return loops().slot_norms(squares, flags, tile.end - tile.begin, eps, upstream, slopes);
  });
}

// Groups are runs of neighbouring slots of one factor, as `work` has them; the gradient is added.
double lasso_of_runs(
    const std::vector<Tile>& work, const int32_t* starts, const bool* removed, double eps, float upstream) {
  return lasso_in_one_sweep(work, true, [&](const Tile& tile, const float* squares, float* slopes) {
    const int32_t* ids = tile.factor->index + tile.begin;
    const int64_t n_slots = tile.end - tile.begin, first = ids[0], n_groups = ids[n_slots - 1] - first + 1;
    if (n_groups == n_slots) return loops().slot_norms(squares, removed + first, n_slots, eps, upstream, slopes);
    std::vector<double> sums(n_groups);
    loops().run_sums(squares, starts + first, n_groups, sums.data());
    // Slopes of groups, which are norms at first, and then of slots: from the last one on, for those of its group or of
    // one before it are read, which lie no further behind.
    const double total = loops().group_norms(sums.data(), starts + first, removed + first, n_groups, eps, slopes);
    loops().group_slopes(removed + first, n_groups, upstream, slopes);
    for (int64_t i = n_slots - 1; i >= 0; --i) slopes[i] = slopes[ids[i] - first];
    return total;
  });
}

Tensor scalar(const Tensor& like, double value) {
  Tensor result = torch::stable::new_empty(like, {}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  return result;
}

std::tuple<Tensor, Tensor> group_lasso_forward(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    Tensor index,
    Tensor order,
    Tensor starts,
    Tensor removed,
    double eps,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  const FactorList list = describe(factors, axes, index);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);

  Tensor norms = torch::stable::new_empty(removed, {n_groups}, ScalarType::Float);
  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  float* norm = static_cast<float*>(norms.mutable_data_ptr());
  const auto leave = [](int64_t, int64_t) {};
  return {scalar(removed, group_norms(list, slots, n_groups, is_removed, eps, norm, leave)), norms};
}

std::vector<Tensor> group_lasso_backward(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    Tensor index,
    Tensor removed,
    Tensor norms,
    Tensor grad_out,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(norms, ScalarType::Float, n_groups, "norms");
  check(grad_out.scalar_type() == ScalarType::Float && grad_out.numel() == 1, "grad_out must be one float32.");
  FactorList list = describe(factors, axes, index);

  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  const float* norm = static_cast<const float*>(norms.const_data_ptr());
  const float upstream = *static_cast<const float*>(grad_out.const_data_ptr());
  std::vector<Tensor> grads = write_to_new(list, factors);
  scale_slots(list, [&](const int32_t* ids, int64_t count, float* scale) {
    loops().slot_slopes(ids, count, is_removed, norm, upstream, scale);
  });
  return grads;
}

void group_prox_(
    std::vector<Tensor> factors,
    std::vector<int64_t> axes,
    Tensor index,
    Tensor order,
    Tensor starts,
    Tensor removed,
    Tensor threshold,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(threshold, ScalarType::Float, n_groups, "threshold");
  FactorList list = describe(factors, axes, index);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);
  write_in_place(list);

  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  const float* limit = static_cast<const float*>(threshold.const_data_ptr());
  const std::unique_ptr<float[]> shrink(new float[n_groups]);
  for_each_group_block(list, slots, n_groups, [&](int64_t first, int64_t count, const double* sums) {
    for (int64_t i = 0; i < count; ++i) {
      const double norm = std::sqrt(sums[i]);
      const float bound = limit[first + i];
      const float shrunk = norm <= bound ? 0.0f : static_cast<float>(1 - bound / norm);
      shrink[first + i] = is_removed[first + i] ? shrunk : 1.0f;
    }
  });
  scale_slots(list, [&](const int32_t* ids, int64_t count, float* scale) {
    for (int64_t i = 0; i < count; ++i) scale[i] = shrink[ids[i]];
  });
}

// Lasso of slots that are groups of their own, and its gradient for an upstream gradient of 1.
std::tuple<Tensor, Tensor> separate_lasso_forward(
    std::vector<Tensor> factors, std::vector<int64_t> axes, Tensor removed, double eps, bool with_direction) {
  FactorList list = describe(factors, axes);
  check_group_vector(removed, ScalarType::Bool, list.slots, "removed");
  Tensor direction = new_storage(list, factors, with_direction);
  if (with_direction) write_to_pieces(list, direction);

  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  return {scalar(removed, separate_lasso(list, is_removed, eps, 1.0f, false)), direction};
}

// The lasso; adds `weight` times its gradient to `grads`. runs: groups are runs of neighbouring slots of one factor, in
// order, and none is empty.
Tensor group_lasso_grad_(
    std::vector<Tensor> factors,
    std::vector<Tensor> grads,
    std::vector<int64_t> axes,
    Tensor index,
    Tensor order,
    Tensor starts,
    std::vector<int64_t> sides,
    Tensor removed,
    Tensor weight,
    double eps,
    bool runs,
    int64_t /*stream*/) {
  const int64_t n_groups = removed.numel();
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check(weight.scalar_type() == ScalarType::Float && weight.numel() == 1, "weight must be one float32.");
  const std::vector<Tensor> held = contiguous(factors), sums = contiguous(grads);
  FactorList list = describe(held, axes, index);
  check_sides(list, sides);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);
  add_to(list, sums);

  const bool* is_removed = static_cast<const bool*>(removed.const_data_ptr());
  const float upstream = *static_cast<const float*>(weight.const_data_ptr());
  double total = 0;
  if (runs && n_groups == list.slots) {
    total = separate_lasso(list, is_removed, eps, upstream, true);
  } else if (const std::vector<Tile> work = runs ? tiles_of_runs(list) : std::vector<Tile>(); !work.empty()) {
    total = lasso_of_runs(work, slots.starts, is_removed, eps, upstream);
  } else {
    const std::unique_ptr<float[]> slope(new float[n_groups]);  // norms at first
    const auto divide = [&](int64_t first, int64_t count) {
      loops().group_slopes(is_removed + first, count, upstream, slope.get() + first);
    };
    total = group_norms(list, slots, n_groups, is_removed, eps, slope.get(), divide);
    const auto fill = [&](const int32_t* ids, int64_t count, float* scale) {
      for (int64_t i = 0; i < count; ++i) scale[i] = slope[ids[i]];
    };
    scale_slots(list, fill, true);
  }
  write_back(sums, grads);
  return scalar(removed, total);
}

template <typename T>
void scale_all(const Tensor& from, float scale, const Tensor& to) {
  const T* data = static_cast<const T*>(from.const_data_ptr());
  T* out = static_cast<T*>(to.mutable_data_ptr());
  torch::stable::parallel_for(0, from.numel(), kTileElements, [&](int64_t begin, int64_t end) {
    loops_for<T>(loops()).scale_rows(data + begin, 1, end - begin, &scale, out + begin);
  });
}

// The pieces of `direction` times the upstream gradient: in its own memory, or in new memory.
std::vector<Tensor> separate_lasso_backward(
    Tensor direction, std::vector<int64_t> sides, Tensor grad_out, bool in_place) {
  check(grad_out.scalar_type() == ScalarType::Float && grad_out.numel() == 1, "grad_out must be one float32.");
  const ScalarType dtype = direction.scalar_type();
  check(direction.is_contiguous() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
        "direction must be contiguous, and float32 or bfloat16.");
  const float upstream = *static_cast<const float*>(grad_out.const_data_ptr());
  const Tensor grad = in_place ? direction : torch::stable::empty_like(direction);
  if (dtype == ScalarType::BFloat16) {
    scale_all<bfloat16>(direction, upstream, grad);
  } else {
    scale_all<float>(direction, upstream, grad);
  }
  return pieces(grad, sides);
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("group_lasso_forward", TORCH_BOX(&atp::cpu::group_lasso_forward));
  m.impl("group_lasso_backward", TORCH_BOX(&atp::cpu::group_lasso_backward));
  m.impl("group_lasso_grad_", TORCH_BOX(&atp::cpu::group_lasso_grad_));
  m.impl("group_prox_", TORCH_BOX(&atp::cpu::group_prox_));
  m.impl("separate_lasso_forward", TORCH_BOX(&atp::cpu::separate_lasso_forward));
  m.impl("separate_lasso_backward", TORCH_BOX(&atp::cpu::separate_lasso_backward));
}
