// Attention of short windows with the packs around it, one call each way. The queries of all heads that share a key are
// one product, scores are float32, and the probabilities are kept for the way back (models/short_attention.py).

#include "packed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace atp::cpu {
namespace {

// Scores that are computed together: page faults in fresh memory cost more than they do.
constexpr int64_t kScores = 1 << 19;

struct Shape {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t groups;  // heads of keys and values
  int64_t dim;

  int64_t shared() const { return heads / groups; }
  // Where a query lies among [batch * groups, shared * tokens]; head is that of the query.
  int64_t query(int64_t b, int64_t head, int64_t t) const {
    return ((b * groups + head / shared()) * shared() + head % shared()) * tokens + t;
  }
  int64_t key(int64_t b, int64_t group, int64_t t) const { return (b * groups + group) * tokens + t; }
};

// Queries [batch * groups, shared * tokens, dim], keys and values [batch * groups, tokens, dim].
struct Heads {
  Tensor q;
  Tensor k;
  Tensor v;
};

struct Angles {
  const float* cos;
  const float* sin;
  bool each;  // whether each row of the batch has its own

  Angles(const Tensor& cosines, const Tensor& sines, const Shape& shape)
      : cos(static_cast<const float*>(cosines.const_data_ptr())),
        sin(static_cast<const float*>(sines.const_data_ptr())),
        each(cosines.size(0) != shape.tokens) {
    for (const Tensor* part : {&cosines, &sines}) {
      check(part->dim() == 2 && part->is_contiguous() && part->scalar_type() == ScalarType::Float &&
                part->size(1) == shape.dim &&
                (part->size(0) == shape.tokens || part->size(0) == shape.batch * shape.tokens) &&
                part->size(0) == cosines.size(0),
            "cos and sin must be contiguous float32 [tokens or all tokens, ", shape.dim, "].");
    }
  }
};

Shape shape_of(const Tensor& x, const Pack& first, const Pack& last, const Tensor& cos, int64_t batch) {
  check(first.layout.places.size() == 3, "factors must be those of q, k, v and o.");
  check(cos.dim() == 2 && cos.size(1) > 0 && cos.size(1) % 2 == 0, "cos must be [tokens, an even head width].");
  const int64_t dim = cos.size(1), rows = x.size(0);
  check(batch > 0 && rows % batch == 0, "the rows must be equally many for each row of the batch.");
  const Place &q = first.layout.places[0], &k = first.layout.places[1], &v = first.layout.places[2];
  const Shape shape{batch, rows / batch, q.rows / dim, k.rows / dim, dim};
  check(shape.groups > 0 && q.rows == shape.heads * dim && k.rows == shape.groups * dim && v.rows == k.rows &&
            shape.heads % shape.groups == 0 && last.layout.inputs == q.rows,
        "heads of ", dim, " must share keys and values evenly.");
  return shape;
}

Heads turned(const Tensor& qkv, const Shape& shape, const Angles& angles) {
  const int64_t all = shape.batch * shape.groups, dim = shape.dim;
  Heads to{torch::stable::new_empty(qkv, {all, shape.shared() * shape.tokens, dim}),
           torch::stable::new_empty(qkv, {all, shape.tokens, dim}), torch::stable::new_empty(qkv, {all, shape.tokens, dim})};
  const bfloat16* from = static_cast<const bfloat16*>(qkv.const_data_ptr());
  bfloat16* q = static_cast<bfloat16*>(to.q.mutable_data_ptr());
  bfloat16* k = static_cast<bfloat16*>(to.k.mutable_data_ptr());
  bfloat16* v = static_cast<bfloat16*>(to.v.mutable_data_ptr());
  for_rows(qkv.size(0), qkv.size(1), [&](int64_t first, int64_t count) {
    const auto rope = loops().attention.rope_row;
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t b = row / shape.tokens, t = row % shape.tokens, at = (angles.each ? row : t) * dim;
      const bfloat16* x = from + row * qkv.size(1);
      for (int64_t head = 0; head < shape.heads; ++head, x += dim) {
        rope(x, angles.cos + at, angles.sin + at, dim / 2, q + shape.query(b, head, t) * dim);
      }
      for (int64_t head = 0; head < shape.groups; ++head, x += dim) {
        rope(x, angles.cos + at, angles.sin + at, dim / 2, k + shape.key(b, head, t) * dim);
      }
      for (int64_t head = 0; head < shape.groups; ++head, x += dim) {
        std::memcpy(v + shape.key(b, head, t) * dim, x, dim * sizeof *x);
      }
    }
  });
  return to;
}

Tensor widened(const Tensor& values) {
  Tensor wide = torch::stable::new_empty(values, {values.size(0), values.size(1), values.size(2)}, ScalarType::Float);
  const bfloat16* from = static_cast<const bfloat16*>(values.const_data_ptr());
  uint32_t* to = static_cast<uint32_t*>(wide.mutable_data_ptr());
  for_rows(values.size(0) * values.size(1), values.size(2), [&](int64_t first, int64_t count) {
    for (int64_t i = first * values.size(2); i < (first + count) * values.size(2); ++i) {
      to[i] = static_cast<uint32_t>(from[i].bits) << 16;
    }
  });
  return wide;
}

// Copies heads between [batch * groups, shared * tokens, dim] and the first columns of rows of tokens.
template <bool kToRows>
void copy_heads(const Tensor& heads, const Tensor& rows, const Shape& shape) {
  const int64_t stride = rows.stride(0), dim = shape.dim;
  bfloat16* one = static_cast<bfloat16*>(heads.mutable_data_ptr());
  bfloat16* other = static_cast<bfloat16*>(rows.mutable_data_ptr());
  for_rows(rows.size(0), shape.heads * dim, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t b = row / shape.tokens, t = row % shape.tokens;
      for (int64_t head = 0; head < shape.heads; ++head) {
        bfloat16 *a = one + shape.query(b, head, t) * dim, *c = other + row * stride + head * dim;
        std::memcpy(kToRows ? c : a, kToRows ? a : c, dim * sizeof *a);
      }
    }
  });
}

// mask bool [batch or 1, tokens, tokens], true for what a token sees; without one it is causal.
Tensor probabilities(const Heads& heads, const Shape& shape, const std::optional<Tensor>& mask, double scale) {
  const int64_t tokens = shape.tokens, queries = shape.shared() * tokens, each = shape.groups * queries;
  const bool* seen = nullptr;
  int64_t mask_stride = 0;
  if (mask.has_value()) {
    check(mask->dim() == 3 && mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
              (mask->size(0) == 1 || mask->size(0) == shape.batch) && mask->size(1) == tokens && mask->size(2) == tokens,
          "mask must be contiguous bool [batch or 1, ", tokens, ", ", tokens, "].");
    seen = static_cast<const bool*>(mask->const_data_ptr());
    mask_stride = mask->size(0) == 1 ? 0 : tokens * tokens;
  }
  Tensor p = torch::stable::new_empty(heads.q, {shape.batch * shape.groups, queries, tokens});
  bfloat16* to = static_cast<bfloat16*>(p.mutable_data_ptr());
  const Tensor q = widened(heads.q), k = widened(heads.k);
  const int64_t at_once = std::max<int64_t>(1, kScores / std::max<int64_t>(1, each * tokens));
  for (int64_t begin = 0; begin < shape.batch; begin += at_once) {
    const int64_t some = std::min(at_once, shape.batch - begin) * shape.groups, from = begin * shape.groups;
    const Tensor some_q = view(q, {some, queries, shape.dim}, {queries * shape.dim, shape.dim, 1}, from * queries * shape.dim);
    const Tensor some_k = view(k, {some, shape.dim, tokens}, {tokens * shape.dim, 1, shape.dim}, from * tokens * shape.dim);
    const Tensor products = all_products(some_q, some_k);
    float* scores = static_cast<float*>(products.mutable_data_ptr());
    for_rows(some * queries, tokens, [&](int64_t first, int64_t count) {
      const auto attend = loops().attention.attend_row;
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t b = begin + row / each, t = row % tokens;
        const bool* visible = seen == nullptr ? nullptr : seen + b * mask_stride + t * tokens;
        attend(scores + row * tokens, visible, t + 1, tokens, static_cast<float>(scale), to + (from * queries + row) * tokens);
      }
    });
  }
  return p;
}

// (y, [x, S], q k v, probabilities, what o reads, scales of the norm or nothing) for factors of q, k, v and o. cos and sin
// [tokens or all tokens, dim]. With a norm of this weight, y is x + block(norm(x)).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> packed_attention_forward(
    Tensor x, Tensor w1, Tensor d1, std::optional<Tensor> b1, Tensor w2, Tensor d2, std::optional<Tensor> b2,
    std::vector<Tensor> factors, double s1, double s2, Tensor cos, Tensor sin, std::optional<Tensor> mask, double scale,
    int64_t batch, std::optional<Tensor> norm, double eps) {
  const Packs packs(w1, d1, b1, w2, d2, b2, factors, s1, s2);
  const Shape shape = shape_of(x, packs.first, packs.last, cos, batch);
  const Angles angles(cos, sin, shape);
  const std::optional<Around> around = around_forward(packs, x, norm);
  auto [qkv, wide] = run(packs.first, x, around, eps);
  packs.last.load();
  const Heads heads = turned(qkv, shape, angles);
  Tensor p = probabilities(heads, shape, mask, scale);
  Tensor hidden = torch::stable::new_empty(wide, {x.size(0), packs.last.width()});
  copy_heads<true>(all_products(p, heads.v), hidden, shape);
  packs.last.complete(hidden);
  return {left(around, packs.last.forward(hidden)), wide, qkv, p, hidden, scales_of(around, wide)};
}

// Takes the gradients of what `turned` made back to those of q, k and v; scale is that of the scores.
Tensor turned_back(
    const Heads& grads, const Tensor& qkv, const Shape& shape, const Angles& angles, double scale) {
  const int64_t dim = shape.dim;
  const float factor = static_cast<float>(scale);
  Tensor result = torch::stable::empty_like(qkv);
  const bfloat16* q = static_cast<const bfloat16*>(grads.q.const_data_ptr());
  const bfloat16* k = static_cast<const bfloat16*>(grads.k.const_data_ptr());
  const bfloat16* v = static_cast<const bfloat16*>(grads.v.const_data_ptr());
  bfloat16* to = static_cast<bfloat16*>(result.mutable_data_ptr());
  for_rows(qkv.size(0), qkv.size(1), [&](int64_t first, int64_t count) {
    const auto back = loops().attention.rope_backward_row;
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t b = row / shape.tokens, t = row % shape.tokens, at = (angles.each ? row : t) * dim;
      bfloat16* d = to + row * qkv.size(1);
      for (int64_t head = 0; head < shape.heads; ++head, d += dim) {
        back(q + shape.query(b, head, t) * dim, angles.cos + at, angles.sin + at, dim / 2, factor, d);
      }
      for (int64_t head = 0; head < shape.groups; ++head, d += dim) {
        back(k + shape.key(b, head, t) * dim, angles.cos + at, angles.sin + at, dim / 2, factor, d);
      }
      for (int64_t head = 0; head < shape.groups; ++head, d += dim) {
        std::memcpy(d, v + shape.key(b, head, t) * dim, dim * sizeof *d);
      }
    }
  });
  return result;
}

// The gradient of x, empty where it is not wanted, and those of the factors of q, k, v and o. With sums [samples, rows of
// q, k and v], those of qkv times its gradient are added to them. x, norm and scales where there was a norm.
std::vector<Tensor> packed_attention_backward(
    Tensor grad, Tensor wide, Tensor qkv, Tensor p, Tensor hidden, Tensor w1, Tensor d1, Tensor w2, Tensor d2,
    std::vector<Tensor> factors, double s1, double s2, Tensor cos, Tensor sin, double scale, int64_t batch, bool need_x,
    std::optional<Tensor> sums, std::optional<Tensor> x, std::optional<Tensor> norm, std::optional<Tensor> scales) {
  const Packs packs(w1, d1, std::nullopt, w2, d2, std::nullopt, factors, s1, s2);
  const int64_t rows = grad.size(0);
  const std::optional<Around> around = around_backward(packs, rows, x, norm, scales);
  const Tensor d_y = around.has_value() ? narrow(grad) : grad;
  check_matrix(d_y, "grad", rows, packs.last.layout.rows);
  check_matrix(wide, "wide", rows, packs.first.width());
  check_matrix(qkv, "qkv", rows, packs.first.layout.rows);
  check_matrix(hidden, "hidden", rows, packs.last.width());
  const Shape shape = shape_of(grad, packs.first, packs.last, cos, batch);
  const Angles angles(cos, sin, shape);
  const int64_t all = shape.batch * shape.groups, queries = shape.shared() * shape.tokens;
  check(p.dim() == 3 && p.is_contiguous() && p.scalar_type() == ScalarType::BFloat16 && p.size(0) == all &&
            p.size(1) == queries && p.size(2) == shape.tokens,
        "p must be contiguous bfloat16 [", all, ", ", queries, ", ", shape.tokens, "].");
  std::vector<Tensor> of_last;
  const Tensor d_rows = *packs.last.backward(d_y, hidden, true, of_last);
  const Tensor d_out = torch::stable::new_empty(d_y, {all, queries, shape.dim});
  copy_heads<false>(d_out, d_rows, shape);
  const Heads heads = turned(qkv, shape, angles);
  const Tensor d_scores = all_products(d_out, all_transposed(heads.v));
  const bfloat16* kept = static_cast<const bfloat16*>(p.const_data_ptr());
  bfloat16* d = static_cast<bfloat16*>(d_scores.mutable_data_ptr());
  for_rows(all * queries, shape.tokens, [&](int64_t first, int64_t count) {
    const auto back = loops().attention.attend_backward_row;
    for (int64_t at = first * shape.tokens; at < (first + count) * shape.tokens; at += shape.tokens) {
      back(d + at, kept + at, shape.tokens, d + at);
    }
  });
  const Heads grads{all_products(d_scores, heads.k), all_products(all_transposed(d_scores), heads.q),
                    all_products(all_transposed(p), d_out)};
  const Tensor d_qkv = turned_back(grads, qkv, shape, angles, scale);
  if (sums.has_value()) add_sample_dots(qkv, d_qkv, *sums);
  std::vector<Tensor> found = run_back(packs.first, d_qkv, wide, need_x);
  if (need_x && around.has_value()) found[0] = around->back(grad, found[0]);
  found.insert(found.end(), of_last.begin(), of_last.end());
  return found;
}

}  // namespace
}  // namespace atp::cpu

STABLE_TORCH_LIBRARY_IMPL(atp_kernels_native, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&atp::cpu::packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&atp::cpu::packed_attention_backward));
}
