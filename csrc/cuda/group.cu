// Group lasso and its proximal step over all factors of a model, in a fixed number of launches.
//
// Deterministic without atomics: every slot (a row or column of a factor) is summed by one thread, and one thread adds
// up the slots of each group in the order of the plan. A slot with a group id out of range is ignored.

#include "../factors.h"
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include <cuda_bf16.h>

#include <algorithm>
#include <tuple>

namespace atp::cuda {
namespace {

__device__ float load(const Factor& factor, const void* from, int64_t at) {
  return factor.is_bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at])
                            : static_cast<const float*>(from)[at];
}

__device__ float load(const Factor& factor, int64_t at) { return load(factor, factor.data, at); }

__device__ void store(const Factor& factor, int64_t at, float value) {
  if (factor.is_bfloat16) {
    static_cast<__nv_bfloat16*>(factor.out)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(factor.out)[at] = value;
  }
}

// Grid: x over the slots of a factor, y over factors. Columns are read coalesced; rows of LoRA factors are a few
// sectors long, which one thread uses whole.
__global__ void slot_squares_kernel(const Factor* factors, int64_t n_factors, float* squares) {
  for (int64_t f = blockIdx.y; f < n_factors; f += gridDim.y) {
    const Factor factor = factors[f];
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot >= factor.slots()) continue;
    const int64_t length = factor.by_row ? factor.cols : factor.rows;
    const int64_t start = factor.by_row ? slot * factor.cols : slot;
    const int64_t step = factor.by_row ? 1 : factor.cols;
    float sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      const float value = load(factor, start + i * step);
      sum += value * value;
    }
    squares[factor.first_slot + slot] = sum;
  }
}

__global__ void group_squares_kernel(GroupSlots slots, const float* squares, int64_t n_groups, double* sums) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= n_groups) return;
  double sum = 0;
  for (int32_t i = slots.starts[group]; i < slots.starts[group + 1]; ++i) sum += squares[slots.order[i]];
  sums[group] = sum;
}

// The sum of what the threads of a block hold, added up by a fixed tree; every thread of the block calls it.
__device__ double block_sum(double own) {
  __shared__ double partial[kThreads];
  partial[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  return partial[0];
}

// One group per thread; parts takes the sum over the removed groups of each block.
__global__ void norms_kernel(
    const double* sums, const int32_t* starts, const bool* removed, double eps, int64_t n_groups, float* norms,
    double* parts) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  double own = 0;
  if (group < n_groups) {
    const double norm = sqrt(sums[group] + eps);
    norms[group] = static_cast<float>(norm);
    if (removed[group] && starts[group + 1] > starts[group]) own = norm;
  }
  const double total = block_sum(own);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// One block: each thread adds a fixed share of the parts.
__global__ void total_kernel(const double* parts, int64_t n_parts, float* value) {
  double own = 0;
  for (int64_t part = threadIdx.x; part < n_parts; part += kThreads) own += parts[part];
  const double total = block_sum(own);
  if (threadIdx.x == 0) *value = static_cast<float>(total);
}

__global__ void slope_kernel(
    const bool* removed, const float* norms, const float* grad_out, int64_t n_groups, float* scale) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= n_groups) return;
  scale[group] = removed[group] && norms[group] != 0 ? *grad_out / norms[group] : 0.0f;
}

__global__ void shrink_kernel(
    const bool* removed, const double* sums, const float* threshold, int64_t n_groups, float* scale) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= n_groups) return;
  const double norm = sqrt(sums[group]);
  const float shrunk = norm <= threshold[group] ? 0.0f : static_cast<float>(1 - threshold[group] / norm);
  scale[group] = removed[group] ? shrunk : 1.0f;
}

// With `add`, what is there already is added to, and a zero scale leaves it as it is.
__global__ void scale_kernel(
    const Factor* factors, int64_t n_factors, int64_t n_groups, const float* scale, bool add) {
  for (int64_t f = blockIdx.y; f < n_factors; f += gridDim.y) {
    const Factor factor = factors[f];
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < factor.rows * factor.cols;
         at += step) {
      const int64_t id = factor.index[factor.by_row ? at / factor.cols : at % factor.cols];
      const float by = id >= 0 && id < n_groups ? scale[id] : 0.0f;
      if (!add) {
        store(factor, at, by == 0 ? 0.0f : load(factor, at) * by);
      } else if (by != 0) {
        store(factor, at, __fadd_rn(load(factor, factor.out, at), __fmul_rn(load(factor, at), by)));
      }
    }
  }
}

// The factor table on the device. The copy is ordered on the stream, and pageable memory is staged before it returns.
Tensor upload(const FactorList& list, const Tensor& like, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(list.factors.size() * sizeof(Factor));
  Tensor table = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  const cudaError_t error =
      cudaMemcpyAsync(table.mutable_data_ptr(), list.factors.data(), bytes, cudaMemcpyHostToDevice, stream);
  check(error == cudaSuccess, "the factor table was not copied: ", cudaGetErrorString(error), ".");
  return table;
}

// x covers the largest factor, y the factors; both kernels stride over what a full grid leaves.
dim3 grid_for(const FactorList& list, int64_t largest) {
  const size_t factors = list.factors.size() < 65535 ? list.factors.size() : 65535;
  return dim3(blocks_for(largest), static_cast<unsigned>(factors));
}

// Sum of squares of every group, float64 [n_groups].
Tensor group_squares(
    const FactorList& list, const GroupSlots& slots, const Tensor& table, const Tensor& removed, cudaStream_t stream) {
  const int64_t n_groups = removed.numel();
  const Tensor squares = torch::stable::new_empty(removed, {list.slots}, ScalarType::Float);
  int64_t largest = 0;
  for (const Factor& factor : list.factors) largest = std::max(largest, factor.slots());
  if (largest > 0) {
    slot_squares_kernel<<<grid_for(list, largest), kThreads, 0, stream>>>(
        static_cast<const Factor*>(table.const_data_ptr()), static_cast<int64_t>(list.factors.size()),
        static_cast<float*>(squares.mutable_data_ptr()));
    check_launch("slot_squares_kernel");
  }
  const Tensor sums = torch::stable::new_empty(removed, {n_groups}, ScalarType::Double);
  if (n_groups > 0) {
    group_squares_kernel<<<blocks_for(n_groups), kThreads, 0, stream>>>(
        slots, static_cast<const float*>(squares.const_data_ptr()), n_groups,
        static_cast<double*>(sums.mutable_data_ptr()));
    check_launch("group_squares_kernel");
  }
  return sums;
}

void scale_by_group(
    const FactorList& list, const Tensor& table, const Tensor& scale, cudaStream_t stream, bool add = false) {
  int64_t largest = 0;
  for (const Factor& factor : list.factors) largest = std::max(largest, factor.rows * factor.cols);
  if (largest == 0) return;
  scale_kernel<<<grid_for(list, std::min<int64_t>(largest, 1 << 20)), kThreads, 0, stream>>>(
      static_cast<const Factor*>(table.const_data_ptr()), static_cast<int64_t>(list.factors.size()), scale.numel(),
      static_cast<const float*>(scale.const_data_ptr()), add);
  check_launch("scale_kernel");
}

// (value, norms of all groups)
std::tuple<Tensor, Tensor> group_norms(
    const FactorList& list, const GroupSlots& slots, const Tensor& table, const Tensor& removed, double eps,
    cudaStream_t stream) {
  const int64_t n_groups = removed.numel();
  const Tensor sums = group_squares(list, slots, table, removed, stream);
  Tensor value = torch::stable::new_empty(removed, {}, ScalarType::Float);
  Tensor norms = torch::stable::new_empty(removed, {n_groups}, ScalarType::Float);
  const unsigned blocks = blocks_for(n_groups);
  const Tensor parts = torch::stable::new_empty(removed, {static_cast<int64_t>(blocks)}, ScalarType::Double);
  if (blocks > 0) {
    norms_kernel<<<blocks, kThreads, 0, stream>>>(
        static_cast<const double*>(sums.const_data_ptr()), slots.starts,
        static_cast<const bool*>(removed.const_data_ptr()), eps, n_groups,
        static_cast<float*>(norms.mutable_data_ptr()), static_cast<double*>(parts.mutable_data_ptr()));
    check_launch("norms_kernel");
  }
  total_kernel<<<1, kThreads, 0, stream>>>(
      static_cast<const double*>(parts.const_data_ptr()), static_cast<int64_t>(blocks),
      static_cast<float*>(value.mutable_data_ptr()));
  check_launch("total_kernel");
  return {value, norms};
}

// Writes the gradient of every factor where its `out` points, or adds it to what is there.
void write_gradients(
    const FactorList& list, const Tensor& table, const Tensor& removed, const Tensor& norms, const Tensor& grad_out,
    cudaStream_t stream, bool add) {
  const int64_t n_groups = removed.numel();
  if (n_groups == 0) return;
  const Tensor slope = torch::stable::new_empty(removed, {n_groups}, ScalarType::Float);
  slope_kernel<<<blocks_for(n_groups), kThreads, 0, stream>>>(
      static_cast<const bool*>(removed.const_data_ptr()), static_cast<const float*>(norms.const_data_ptr()),
      static_cast<const float*>(grad_out.const_data_ptr()), n_groups, static_cast<float*>(slope.mutable_data_ptr()));
  check_launch("slope_kernel");
  scale_by_group(list, table, slope, stream, add);
}

std::tuple<Tensor, Tensor> group_lasso_forward(
    std::vector<Tensor> factors, std::vector<int64_t> axes, Tensor index, Tensor order, Tensor starts, Tensor removed,
    double eps, int64_t stream_handle) {
  const int64_t n_groups = removed.numel();
  const cudaStream_t stream = as_stream(stream_handle);
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  const FactorList list = describe(factors, axes, index);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);
  return group_norms(list, slots, upload(list, removed, stream), removed, eps, stream);
}

std::vector<Tensor> group_lasso_backward(
    std::vector<Tensor> factors, std::vector<int64_t> axes, Tensor index, Tensor removed, Tensor norms,
    Tensor grad_out, int64_t stream_handle) {
  const int64_t n_groups = removed.numel();
  const cudaStream_t stream = as_stream(stream_handle);
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(norms, ScalarType::Float, n_groups, "norms");
  check(grad_out.scalar_type() == ScalarType::Float && grad_out.numel() == 1, "grad_out must be one float32.");
  FactorList list = describe(factors, axes, index);
  std::vector<Tensor> grads = write_to_new(list, factors);
  write_gradients(list, upload(list, removed, stream), removed, norms, grad_out, stream, false);
  return grads;
}

Tensor group_lasso_grad_(
    std::vector<Tensor> factors, std::vector<Tensor> grads, std::vector<int64_t> axes, Tensor index, Tensor order,
    Tensor starts, std::vector<int64_t> sides, Tensor removed, Tensor weight, double eps, bool /*runs*/,
    int64_t stream_handle) {
  check(removed.is_cuda(), "the plan lies on a CPU and factors elsewhere.");
  const int64_t n_groups = removed.numel();
  const cudaStream_t stream = as_stream(stream_handle);
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check(weight.scalar_type() == ScalarType::Float && weight.numel() == 1, "weight must be one float32.");
  const std::vector<Tensor> held = contiguous(factors), sums = contiguous(grads);
  FactorList list = describe(held, axes, index);
  check_sides(list, sides);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);
  add_to(list, sums);
  const Tensor table = upload(list, removed, stream);
  const auto [value, norms] = group_norms(list, slots, table, removed, eps, stream);
  write_gradients(list, table, removed, norms, weight, stream, true);
  write_back(sums, grads);
  return value;
}

void group_prox_(
    std::vector<Tensor> factors, std::vector<int64_t> axes, Tensor index, Tensor order, Tensor starts, Tensor removed,
    Tensor threshold, int64_t stream_handle) {
  const int64_t n_groups = removed.numel();
  const cudaStream_t stream = as_stream(stream_handle);
  check_group_vector(removed, ScalarType::Bool, n_groups, "removed");
  check_group_vector(threshold, ScalarType::Float, n_groups, "threshold");
  FactorList list = describe(factors, axes, index);
  const GroupSlots slots = group_slots(list, order, starts, n_groups);
  write_in_place(list);
  if (n_groups == 0) return;
  const Tensor table = upload(list, removed, stream);
  const Tensor sums = group_squares(list, slots, table, removed, stream);
  const Tensor scale = torch::stable::new_empty(removed, {n_groups}, ScalarType::Float);
  shrink_kernel<<<blocks_for(n_groups), kThreads, 0, stream>>>(
      static_cast<const bool*>(removed.const_data_ptr()), static_cast<const double*>(sums.const_data_ptr()),
      static_cast<const float*>(threshold.const_data_ptr()), n_groups, static_cast<float*>(scale.mutable_data_ptr()));
  check_launch("shrink_kernel");
  scale_by_group(list, table, scale, stream);
}

}  // namespace
}  // namespace atp::cuda

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CUDA, m) {
  m.impl("group_lasso_forward", TORCH_BOX(&atp::cuda::group_lasso_forward));
  m.impl("group_lasso_backward", TORCH_BOX(&atp::cuda::group_lasso_backward));
  m.impl("group_lasso_grad_", TORCH_BOX(&atp::cuda::group_lasso_grad_));
  m.impl("group_prox_", TORCH_BOX(&atp::cuda::group_prox_));
}
