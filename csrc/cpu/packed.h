// Linears of one input with their adapters packed beside them, and the parts of blocks that are made of such packs.
#pragma once

#include "products.h"

#include <optional>
#include <tuple>
#include <vector>

namespace atp::cpu {

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

// y = [x, S] weight^T + bias with S = x down^T; weight [rows, inputs + ranks] is [W, B] and down [ranks, inputs] the
// scaled A, both bfloat16. factors: lora_a and lora_b of each linear, float32.
struct Pack {
  Tensor weight;
  Tensor down;
  std::optional<Tensor> bias;
  std::vector<Tensor> factors;
  double scaling;
  Layout layout;

  // Throws where the parts do not fit each other.
  Pack(Tensor weight, Tensor down, std::optional<Tensor> bias, std::vector<Tensor> factors, double scaling);

  // Writes the factors to where products read them.
  void load() const;

  // [x, S] for M rows of x, of which the caller has written the first `inputs` columns.
  void complete(const Tensor& wide) const;

  Tensor x_of(const Tensor& wide) const { return some_columns(wide, 0, layout.inputs); }
  Tensor s_of(const Tensor& wide) const { return some_columns(wide, layout.inputs, layout.ranks); }
  int64_t width() const { return layout.inputs + layout.ranks; }

  // y [M, rows].
  Tensor forward(const Tensor& wide) const;

  // The gradient [M, inputs] of x, where it is wanted, for that [M, rows] of y; adds those of the factors to `grads`.
  std::optional<Tensor> backward(const Tensor& grad, const Tensor& wide, bool need_x, std::vector<Tensor>& grads) const;
};

// The two packs of a block, the second of one linear, whose factors are the last.
struct Packs {
  Pack first;
  Pack last;

  Packs(Tensor w1, Tensor d1, std::optional<Tensor> b1, Tensor w2, Tensor d2, std::optional<Tensor> b2,
        const std::vector<Tensor>& factors, double s1, double s2);
};

// The RMSNorm and the residual connection around a block: x + block(norm(x)) of a float32 stream x [M, inputs].
struct Around {
  Tensor x;
  Tensor weight;
  Tensor scales;  // [M], what the norm multiplies rows by

  // norm(x) in bfloat16 into the first columns of `wide`; fills the scales.
  void enter(const Tensor& wide, double eps) const;

  // x + y.
  Tensor leave(const Tensor& y) const;

  // The gradient of x for that of the result, float32, and that of norm(x), bfloat16.
  Tensor back(const Tensor& grad, const Tensor& d_normed) const;
};

// A float32 matrix in bfloat16.
Tensor narrow(const Tensor& values);

// (y, [x, S]) for contiguous x [M, inputs], normed where something surrounds it, with the factors as they are now.
std::tuple<Tensor, Tensor> run(
    const Pack& pack, const Tensor& x, const std::optional<Around>& around = std::nullopt, double eps = 0.0);

// The gradient of x, empty where it is not wanted, and those of the factors.
std::vector<Tensor> run_back(const Pack& pack, const Tensor& grad, const Tensor& wide, bool need_x);

// What surrounds a block, nothing without a norm. In the forward pass it makes the scales.
std::optional<Around> around_forward(const Packs& packs, const Tensor& x, const std::optional<Tensor>& norm);
std::optional<Around> around_backward(
    const Packs& packs, int64_t rows, const std::optional<Tensor>& x, const std::optional<Tensor>& norm,
    const std::optional<Tensor>& scales);

// What a block gives, with what surrounds it, and the scales that were made on the way, else nothing.
Tensor left(const std::optional<Around>& around, Tensor y);
Tensor scales_of(const std::optional<Around>& around, const Tensor& like);

// Throws unless `values` is a contiguous bfloat16 matrix of this size.
void check_matrix(const Tensor& values, const char* name, int64_t rows, int64_t cols);

// act(gate) * up into h, and its gradients; matrices of one shape and dtype, whose rows may lie apart. See
// activations.cpp.
void swiglu_into(const Tensor& gate, const Tensor& up, const Tensor& h, bool gelu);
void swiglu_backward(
    Tensor d_h, Tensor gate, Tensor up, Tensor d_gate, Tensor d_up, std::optional<Tensor> sums, bool gelu);

// Adds the column sums of left * right over the rows of each sample to its row of `sums`. See columns.cpp.
void add_sample_dots(Tensor left, Tensor right, Tensor sums);

}  // namespace atp::cpu
