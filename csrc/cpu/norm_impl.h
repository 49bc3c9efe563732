// Bodies of the loops over rows of RMSNorm, included after loops_impl.h once per instruction set. Sums as in
// row_squares: float32 over runs in eight lanes, float64 over the runs, the same order in all sets.

// The sum over a row of term(first column, number of columns), a float8 each.
template <typename Term>
inline __attribute__((always_inline)) double row_sum(int64_t cols, const Term& term) {
  double8 total = {};
  for (int64_t start = 0; start < cols; start += kRun * kLanes) {
    const int64_t stop = std::min(start + kRun * kLanes, cols);
    float8 run = {};
    int64_t col = start;
    for (; col + kLanes <= stop; col += kLanes) run += term(col, kLanes);
    if (col < stop) run += term(col, stop - col);
    total += __builtin_convertvector(run, double8);
  }
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += total[k];
  return sum;
}

template <typename T>
inline __attribute__((always_inline)) float8 load_some(const T* from, int64_t count) {
  return count == kLanes ? load8(from) : load_tail(from, count);
}

template <typename T>
inline __attribute__((always_inline)) void store_some(T* to, float8 value, int64_t count) {
  count == kLanes ? store8(to, value) : store_tail(to, value, count);
}

template <typename X, typename Y>
float rms_norm_row(const X* x, const float* weight, double eps, int64_t cols, Y* y) {
  const double squares = row_sum(cols, [&](int64_t col, int64_t count) {
    const float8 value = load_some(x + col, count);
    return value * value;
  });
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(squares / static_cast<double>(cols) + eps));
  for (int64_t col = 0; col < cols; col += kLanes) {
    const int64_t count = std::min(kLanes, cols - col);
    store_some(y + col, load_some(x + col, count) * scale * load_some(weight + col, count), count);
  }
  return scale;
}

template <typename X, typename Y>
void rms_norm_backward_row(const Y* d_y, const X* x, const float* weight, float scale, int64_t cols, X* d_x) {
  const double dot = row_sum(cols, [&](int64_t col, int64_t count) {
    return load_some(d_y + col, count) * load_some(weight + col, count) * load_some(x + col, count);
  });
  const double wide = scale;
  const float pull = static_cast<float>(dot * wide * wide / static_cast<double>(cols));
  for (int64_t col = 0; col < cols; col += kLanes) {
    const int64_t count = std::min(kLanes, cols - col);
    const float8 direct = load_some(d_y + col, count) * load_some(weight + col, count);
    store_some(d_x + col, (direct - load_some(x + col, count) * pull) * scale, count);
  }
}

template <typename X, typename Y>
constexpr NormLoops<X, Y> norm_loops() {
  return {rms_norm_row<X, Y>, rms_norm_backward_row<X, Y>};
}
