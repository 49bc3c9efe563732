// The inner loops, compiled once per instruction set and picked at run time.
#pragma once

#include <cstdint>
#include <vector>

namespace atp::cpu {

struct bfloat16 {
  uint16_t bits;
};

// Row-major tiles. `stride` is the distance between rows in elements; `scale` has one entry per row or per column.
// A zero scale writes or adds exact zeros, whatever the input holds.
template <typename T>
struct GroupLoops {
  void (*row_squares)(const T* x, int64_t rows, int64_t cols, float* out);
  void (*column_squares)(const T* x, int64_t rows, int64_t cols, int64_t stride, float* out);
  void (*scale_rows)(const T* x, int64_t rows, int64_t cols, const float* scale, T* out);
  void (*scale_columns)(const T* x, int64_t rows, int64_t cols, int64_t stride, const float* scale, T* out);
  // out += x * scale, rounded once.
  void (*add_scaled_rows)(const T* x, int64_t rows, int64_t cols, const float* scale, T* out);
  void (*add_scaled_columns)(const T* x, int64_t rows, int64_t cols, int64_t stride, const float* scale, T* out);
};

// Dropout of one call: an element is kept where its random word is at least `threshold`, and then scaled.
struct Drop {
  uint32_t threshold;
  float scale;
  uint32_t key_low;
  uint32_t key_high;
};

// Contiguous rows. `mask` and `sums` have one entry per column; sums are those of these rows alone.
template <typename T>
struct ColumnLoops {
  void (*mask_rows)(const T* x, int64_t rows, int64_t cols, const float* mask, T* out);
  void (*dot_rows)(const T* left, const T* right, int64_t rows, int64_t cols, float* sums);
  void (*mask_and_dot_rows)(
      const T* grad, const T* total, int64_t rows, int64_t cols, const float* mask, T* out, float* sums);
  void (*drop_row)(const T* x, int64_t cols, uint32_t row, const Drop& drop, T* out);
};

// One row of act(gate) * up, or of its gradients; d_gate may be d_h.
template <typename T>
struct ActivationLoops {
  void (*swiglu_row)(const T* gate, const T* up, int64_t cols, T* h);
  void (*swiglu_backward_row)(const T* d_h, const T* gate, const T* up, int64_t cols, T* d_gate, T* d_up);
  // Also adds d_gate * gate + d_up * up to sums, from what they were before they were rounded.
  void (*swiglu_backward_dot_row)(
      const T* d_h, const T* gate, const T* up, int64_t cols, T* d_gate, T* d_up, float* sums);
};

// One row of logits. The result is the loss; softmax - onehot(target) takes the place of x.
template <typename T>
struct SoftmaxLoops {
  double (*cross_entropy_row)(T* x, int64_t cols, int64_t target);
};

// One row of weight * x * scale with scale = 1 / sqrt(mean of x squared + eps), which is returned, or of its gradient.
template <typename X, typename Y>
struct NormLoops {
  float (*rms_norm_row)(const X* x, const float* weight, double eps, int64_t cols, Y* y);
  void (*rms_norm_backward_row)(
      const Y* d_y, const X* x, const float* weight, float scale, int64_t cols, X* d_x);
};

// One head or one row of scores in bfloat16; see attention_impl.h.
struct AttentionLoops {
  void (*rope_row)(const bfloat16* x, const float* cos, const float* sin, int64_t half, bfloat16* out);
  void (*rope_backward_row)(
      const bfloat16* d, const float* cos, const float* sin, int64_t half, float scale, bfloat16* d_x);
  void (*attend_row)(float* scores, const bool* seen, int64_t visible, int64_t cols, float scale, bfloat16* p);
  void (*attend_backward_row)(const bfloat16* d_p, const bfloat16* p, int64_t cols, bfloat16* d_scores);
};

struct Loops {
  const char* isa;

  // Squares of slots -> sums of `count` groups, whose slots are order[starts[group]] to order[starts[group + 1] - 1].
  void (*group_sums)(const float* squares, const int32_t* order, const int32_t* starts, int64_t count, double* sums);

  // The same of runs: the slots of groups lie next to each other, and squares begins at the first of them.
  void (*run_sums)(const float* squares, const int32_t* starts, int64_t count, double* sums);

  // norms[group] = sqrt(sums[group] + eps); returns the sum of those of removed groups that own a slot.
  double (*group_norms)(
      const double* sums, const int32_t* starts, const bool* removed, int64_t count, double eps, float* norms);

  // norms[group] becomes upstream / norms[group] where the group is removed and its norm is not 0, else 0.
  void (*group_slopes)(const bool* removed, int64_t count, float upstream, float* norms);

  // out[slot] = upstream / norms[group of the slot] where that group is removed and its norm is not 0, else 0.
  void (*slot_slopes)(
      const int32_t* index, int64_t count, const bool* removed, const float* norms, float upstream, float* out);

  // For slots that are groups of their own: slopes[slot] = upstream / sqrt(squares[slot] + eps) where the slot is removed
  // and that norm is not 0, else 0. Returns the sum of the norms of removed slots.
  double (*slot_norms)(
      const float* squares, const bool* removed, int64_t count, double eps, float upstream, float* slopes);

  // out = weight + the sum over j < rank of factors[j] * lora_a[j], for one row of a weight; lora_a is [rank, cols].
  void (*merge_row)(
      const float* weight, const float* lora_a, const float* factors, int64_t rank, int64_t cols, bfloat16* out);

  GroupLoops<float> float32;
  GroupLoops<bfloat16> bfloat16_;
  ColumnLoops<float> float32_columns;
  ColumnLoops<bfloat16> bfloat16_columns;
  ActivationLoops<float> float32_activations[2];  // of SiLU, and of GELU by its tanh
  ActivationLoops<bfloat16> bfloat16_activations[2];
  SoftmaxLoops<float> float32_softmax;
  SoftmaxLoops<bfloat16> bfloat16_softmax;
  NormLoops<float, float> float32_norm;
  NormLoops<float, bfloat16> narrowing_norm;
  NormLoops<bfloat16, float> widening_norm;
  NormLoops<bfloat16, bfloat16> bfloat16_norm;
  AttentionLoops attention;
};

template <typename T>
const GroupLoops<T>& loops_for(const Loops& loops) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return loops.float32;
  } else {
    return loops.bfloat16_;
  }
}

template <typename T>
const ColumnLoops<T>& columns_for(const Loops& loops) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return loops.float32_columns;
  } else {
    return loops.bfloat16_columns;
  }
}

template <typename T>
const ActivationLoops<T>& activations_for(const Loops& loops, bool gelu) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return loops.float32_activations[gelu];
  } else {
    return loops.bfloat16_activations[gelu];
  }
}

template <typename T>
const SoftmaxLoops<T>& softmax_for(const Loops& loops) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return loops.float32_softmax;
  } else {
    return loops.bfloat16_softmax;
  }
}

template <typename X, typename Y>
const NormLoops<X, Y>& norm_for(const Loops& loops) {
  if constexpr (sizeof(X) == sizeof(float) && sizeof(Y) == sizeof(float)) {
    return loops.float32_norm;
  } else if constexpr (sizeof(X) == sizeof(float)) {
    return loops.narrowing_norm;
  } else if constexpr (sizeof(Y) == sizeof(float)) {
    return loops.widening_norm;
  } else {
    return loops.bfloat16_norm;
  }
}

// Every set in this binary, from the baseline up.
const std::vector<const Loops*>& compiled_loops();

// The best set this processor runs, or the one the environment variable ATP_KERNELS_ISA names.
// Throws std::runtime_error for a name that is unknown or that this processor cannot run.
const Loops& loops();

}  // namespace atp::cpu
