// Gathers the kept rows and columns of a weight into a new, zero-padded one. Indices are trusted: reading them on the
// host would stall the stream, so the caller checks them where it makes them.

#include "../gather.h"
#include "launch.h"

#include <torch/csrc/stable/library.h>

namespace atp::cuda {
namespace {

// Threads of a block walk along one output row, so writes are coalesced, and reads too when columns are not gathered.
template <typename T>
__global__ void gather_kernel(
    const T* __restrict__ from, T* __restrict__ to, int64_t stride, int64_t rows, int64_t cols, int64_t out_rows,
    int64_t out_cols, const int64_t* __restrict__ row_index, const int64_t* __restrict__ col_index) {
  for (int64_t row = blockIdx.x; row < out_rows; row += gridDim.x) {
    const bool kept = row < rows;
    const T* in = from + (kept ? (row_index ? row_index[row] : row) : 0) * stride;
    T* out = to + row * out_cols;
    for (int64_t col = threadIdx.x; col < out_cols; col += blockDim.x) {
      out[col] = kept && col < cols ? in[col_index ? col_index[col] : col] : T{};
    }
  }
}

template <typename T>
void launch(const Tensor& weight, const Gather& plan, int64_t elements, cudaStream_t stream) {
  if (plan.out_rows == 0 || plan.out_cols == 0) return;
  const unsigned blocks = static_cast<unsigned>(plan.out_rows < 65536 ? plan.out_rows : 65536);
  gather_kernel<T><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(weight.const_data_ptr()), static_cast<T*>(plan.out.mutable_data_ptr()),
      weight.size(1) / elements, plan.rows, plan.cols / elements, plan.out_rows, plan.out_cols / elements,
      plan.row_index, plan.col_index);
  check_launch("gather_kernel");
}

// Whole rows move in 16-byte pieces where their length and both addresses allow it.
bool moves_in_16_bytes(const Tensor& weight, const Gather& plan, int64_t element) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return plan.col_index == nullptr && plan.cols * element % 16 == 0 && aligned(weight.const_data_ptr()) &&
         aligned(plan.out.const_data_ptr());
}

Tensor compact(
    Tensor weight, std::optional<Tensor> rows, std::optional<Tensor> cols, int64_t pad_to, int64_t stream_handle) {
  const Gather plan = plan_gather(weight, rows, cols, pad_to);
  const cudaStream_t stream = as_stream(stream_handle);
  const int64_t element = static_cast<int64_t>(weight.element_size());
  if (moves_in_16_bytes(weight, plan, element)) {
    launch<uint4>(weight, plan, 16 / element, stream);
    return plan.out;
  }
  switch (element) {
    case 1: launch<uint8_t>(weight, plan, 1, stream); break;
    case 2: launch<uint16_t>(weight, plan, 1, stream); break;
    case 4: launch<uint32_t>(weight, plan, 1, stream); break;
    case 8: launch<uint64_t>(weight, plan, 1, stream); break;
    default: check(false, "compact takes elements of 1, 2, 4 or 8 bytes.");
  }
  return plan.out;
}

}  // namespace
}  // namespace atp::cuda

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CUDA, m) {
  m.impl("compact", TORCH_BOX(&atp::cuda::compact));
}
