// Bodies of the loops of attention in short windows, included after softmax_impl.h and norm_impl.h once per instruction
// set. Sums as in row_sum: all sets agree to the last bit.

// RoPE of one head: pairs (x_i, x_{i+half}) turn by the angles whose cosines and sines are given, [2 half] each.
inline void rope_row(const bfloat16* x, const float* cos, const float* sin, int64_t half, bfloat16* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = std::min(kLanes, half - i);
    const float8 one = load_some(x + i, count), other = load_some(x + half + i, count);
    const float8 first = one * load_some(cos + i, count) - other * load_some(sin + i, count);
    const float8 second = other * load_some(cos + half + i, count) + one * load_some(sin + half + i, count);
    store_some(out + i, first, count);
    store_some(out + half + i, second, count);
  }
}

// The gradient of x in `rope_row`, times `scale`, for that of its result.
inline void rope_backward_row(
    const bfloat16* d, const float* cos, const float* sin, int64_t half, float scale, bfloat16* d_x) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = std::min(kLanes, half - i);
    const float8 one = load_some(d + i, count), other = load_some(d + half + i, count);
    const float8 first = one * load_some(cos + i, count) + other * load_some(sin + half + i, count);
    const float8 second = other * load_some(cos + half + i, count) - one * load_some(sin + i, count);
    store_some(d_x + i, first * scale, count);
    store_some(d_x + half + i, second * scale, count);
  }
}

// Softmax of scale * scores where `seen` is true, over the first `visible` columns where it is null. What is not seen has
// the least score that there is, so that a row that sees nothing is a mean. Overwrites the scores.
inline void attend_row(float* scores, const bool* seen, int64_t visible, int64_t cols, float scale, bfloat16* p) {
  const float least = -__FLT_MAX__;
  for (int64_t col = 0; col < cols; ++col) {
    const bool is_seen = seen == nullptr ? col < visible : seen[col];
    scores[col] = is_seen ? scores[col] * scale : least;
  }
  const float largest = row_max(scores, cols);
  int64_t col = 0;
  for (; col + kPair <= cols; col += kPair) store_pair(scores + col, shifted_exponentials(load_pair(scores + col), largest));
  if (col < cols) {
    const int64_t count = cols - col;
    store_pair(scores + col, shifted_exponentials(load_pair(scores + col, count), largest), count);
  }
  const double sum = row_sum(cols, [&](int64_t at, int64_t count) { return load_some(scores + at, count); });
  const float inverse = static_cast<float>(1.0 / sum);
  for (int64_t at = 0; at < cols; at += kLanes) {
    const int64_t count = std::min(kLanes, cols - at);
    store_some(p + at, load_some(scores + at, count) * inverse, count);
  }
}

// d_scores = p (d_p - sum of p d_p), which may be d_p.
inline void attend_backward_row(const bfloat16* d_p, const bfloat16* p, int64_t cols, bfloat16* d_scores) {
  const double dot = row_sum(cols, [&](int64_t at, int64_t count) {
    return load_some(d_p + at, count) * load_some(p + at, count);
  });
  const float mean = static_cast<float>(dot);
  for (int64_t at = 0; at < cols; at += kLanes) {
    const int64_t count = std::min(kLanes, cols - at);
    store_some(d_scores + at, load_some(p + at, count) * (load_some(d_p + at, count) - mean), count);
  }
}

constexpr AttentionLoops attention_loops() {
  return {rope_row, rope_backward_row, attend_row, attend_backward_row};
}
