// Bodies of the loops over gated activations, included after loops_impl.h once per instruction set: float32 inside, one
// rounding at the end, no contraction, so that all sets agree to the last bit.
//
// An element depends on no other, so each set takes its own widest vectors (kVectorBytes), two at a time.

typedef float floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t words __attribute__((vector_size(kVectorBytes)));

constexpr int64_t kVector = kVectorBytes / sizeof(float);
constexpr int64_t kPair = 2 * kVector;
// From here on silu and its derivative are in float32 what they are at infinity: exp(-kSaturated) rounds to 0.
constexpr float kSaturated = 120.0f;
constexpr uint32_t kSign = 0x80000000u;

// kPair elements: the two halves of the run in float32, those at even and at odd places in bfloat16. Both take the
// fewest instructions to load and store, and the order is no matter.
struct Pair {
  floats first, second;
};

inline __attribute__((always_inline)) Pair load_pair(const float* from) {
  Pair pair;
  std::memcpy(&pair.first, from, sizeof pair.first);
  std::memcpy(&pair.second, from + kVector, sizeof pair.second);
  return pair;
}

inline __attribute__((always_inline)) Pair load_pair(const bfloat16* from) {
  words both;
  std::memcpy(&both, from, sizeof both);
  return {(floats)(both << 16), (floats)(both & 0xffff0000u)};
}

// The high halves are bfloat16, rounded to nearest even.
inline __attribute__((always_inline)) words rounded(floats value) {
  const words bits = (words)value;
  return value != value ? words{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline __attribute__((always_inline)) void store_pair(float* to, Pair pair) {
  std::memcpy(to, &pair.first, sizeof pair.first);
  std::memcpy(to + kVector, &pair.second, sizeof pair.second);
}

inline __attribute__((always_inline)) void store_pair(bfloat16* to, Pair pair) {
  const words both = (rounded(pair.first) >> 16) | (rounded(pair.second) & 0xffff0000u);
  std::memcpy(to, &both, sizeof both);
}

template <typename T>
inline __attribute__((always_inline)) Pair load_pair(const T* from, int64_t count) {
  T buffer[kPair] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load_pair(buffer);
}

template <typename T>
inline __attribute__((always_inline)) void store_pair(T* to, Pair pair, int64_t count) {
  T buffer[kPair];
  store_pair(buffer, pair);
  std::memcpy(to, buffer, count * sizeof(T));
}

// exp(t) for -kSaturated <= t <= 0. With t = n ln 2 + r it is 2^n e^r, and e^r a minimax polynomial on |r| <= ln 2 / 2
// (relative error 5e-9). ln 2 is taken off in two parts, of which n times the first is exact (Cody and Waite 1980).
inline __attribute__((always_inline)) floats exponential(floats t) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. The 64 more keep the sum of exponents normal
  // and are taken back by the product, which rounds a subnormal result once.
  constexpr float kShift = 0x1.8p23f + 64;
  const floats shifted = t * 0x1.715476p0f + kShift;
  const floats n = shifted - kShift;
  const floats r = (t - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  const floats square = r * r;
  const floats upper = r * 0x1.123fc6p-7f + 0x1.555916p-5f + square * 0x1.6a1a72p-10f;
  const floats tail = upper * square + (r * 0x1.55548ap-3f + 0x1.fffffcp-2f);
  const floats power = (tail * square + r) + 1.0f;
  return (floats)((words)power + ((words)shifted << 23)) * 0x1p-64f;
}

// silu(x) = x s(x) and silu'(x) = s(x) (1 + x (1 - s(x))) with s(x) = 1 / (1 + exp(-x)). Only exp(-|x|) is used, so
// nothing overflows and 1 - s does not cancel; clamped, an infinite x never meets a factor of zero. NaN passes all.
inline __attribute__((always_inline)) void silu(floats x, floats* value, floats* slope) {
  const floats one = floats{} + 1.0f, least = floats{} - kSaturated;
  const floats negated = (floats)((words)x | kSign);
  const floats t = negated < least ? least : negated;
  const floats power = exponential(t), inverse = 1.0f / (1.0f + power);
  const floats sigmoid = (x < 0.0f ? power : one) * inverse;
  const floats rest = (x < 0.0f ? one : power) * inverse;
  *value = (x < 0.0f ? t : x) * sigmoid;
  *slope = sigmoid * (1.0f + (x < 0.0f ? t : -t) * rest);
}

// GELU by its tanh is x s(z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), and its derivative s(z) (1 + x z' (1 - s(z))).
// Beyond kSaturated s(z) is 0 or 1, so x is clamped there: its cube stays finite.
inline __attribute__((always_inline)) void gelu(floats x, floats* value, floats* slope) {
  constexpr float kTwice = 1.5957691216057308f;
  const floats one = floats{} + 1.0f, most = floats{} + kSaturated;
  const floats above = x < -most ? -most : x;
  const floats inner = above > most ? most : above, square = inner * inner;
  const floats z = inner * (kTwice * (1.0f + 0.044715f * square));
  const floats negated = (floats)((words)z | kSign);
  const floats power = exponential(negated < -most ? -most : negated), inverse = 1.0f / (1.0f + power);
  const floats sigmoid = (z < 0.0f ? power : one) * inverse;
  const floats rest = (z < 0.0f ? one : power) * inverse;
  *value = above * sigmoid;
  *slope = sigmoid * (1.0f + inner * (kTwice * (1.0f + 0.134145f * square)) * rest);
}

template <bool kGelu>
inline __attribute__((always_inline)) void activate(floats x, floats* value, floats* slope) {
  if constexpr (kGelu) {
    gelu(x, value, slope);
  } else {
    silu(x, value, slope);
  }
}

template <bool kGelu>
inline __attribute__((always_inline)) floats swiglu(floats gate, floats up) {
  floats value, slope;
  activate<kGelu>(gate, &value, &slope);
  return value * up;
}

template <bool kGelu>
inline __attribute__((always_inline)) Pair swiglu(Pair gate, Pair up) {
  return {swiglu<kGelu>(gate.first, up.first), swiglu<kGelu>(gate.second, up.second)};
}

template <bool kGelu>
inline __attribute__((always_inline)) void swiglu_grads(
    floats d_h, floats gate, floats up, floats* d_gate, floats* d_up) {
  floats value, slope;
  activate<kGelu>(gate, &value, &slope);
  *d_gate = d_h * up * slope;
  *d_up = d_h * value;
}

template <bool kGelu>
inline __attribute__((always_inline)) void swiglu_grads(Pair d_h, Pair gate, Pair up, Pair* d_gate, Pair* d_up) {
  swiglu_grads<kGelu>(d_h.first, gate.first, up.first, &d_gate->first, &d_up->first);
  swiglu_grads<kGelu>(d_h.second, gate.second, up.second, &d_gate->second, &d_up->second);
}

inline __attribute__((always_inline)) Pair dot_pair(Pair gate, Pair up, Pair d_gate, Pair d_up) {
  return {d_gate.first * gate.first + d_up.first * up.first, d_gate.second * gate.second + d_up.second * up.second};
}

// kPair floats in the order in which `load_pair` of T puts them.
template <typename T>
inline __attribute__((always_inline)) Pair as_pair(const float* from) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return load_pair(from);
  } else {
    Pair pair;
    for (int64_t i = 0; i < kVector; ++i) {
      pair.first[i] = from[2 * i];
      pair.second[i] = from[2 * i + 1];
    }
    return pair;
  }
}

template <typename T>
inline __attribute__((always_inline)) void keep_pair(float* to, Pair pair) {
  if constexpr (sizeof(T) == sizeof(float)) {
    store_pair(to, pair);
  } else {
    for (int64_t i = 0; i < kVector; ++i) {
      to[2 * i] = pair.first[i];
      to[2 * i + 1] = pair.second[i];
    }
  }
}

template <typename T, bool kGelu>
void swiglu_row(const T* gate, const T* up, int64_t cols, T* h) {
  int64_t col = 0;
  for (; col + kPair <= cols; col += kPair) {
    store_pair(h + col, swiglu<kGelu>(load_pair(gate + col), load_pair(up + col)));
  }
  if (col < cols) {
    const int64_t count = cols - col;
    store_pair(h + col, swiglu<kGelu>(load_pair(gate + col, count), load_pair(up + col, count)), count);
  }
}

template <typename T, bool kGelu, bool kDot>
inline __attribute__((always_inline)) void swiglu_backward_any(
    const T* d_h, const T* gate, const T* up, int64_t cols, T* d_gate, T* d_up, float* sums) {
  Pair first, second;
  int64_t col = 0;
  for (; col + kPair <= cols; col += kPair) {
    const Pair g = load_pair(gate + col), u = load_pair(up + col);
    swiglu_grads<kGelu>(load_pair(d_h + col), g, u, &first, &second);
    store_pair(d_gate + col, first);
    store_pair(d_up + col, second);
    if constexpr (kDot) {
      const Pair dot = dot_pair(g, u, first, second), sum = as_pair<T>(sums + col);
      keep_pair<T>(sums + col, {sum.first + dot.first, sum.second + dot.second});
    }
  }
  if (col < cols) {
    const int64_t count = cols - col;
    const Pair upstream = load_pair(d_h + col, count), g = load_pair(gate + col, count), u = load_pair(up + col, count);
    swiglu_grads<kGelu>(upstream, g, u, &first, &second);
    store_pair(d_gate + col, first, count);
    store_pair(d_up + col, second, count);
    if constexpr (kDot) {
      float buffer[kPair];
      keep_pair<T>(buffer, dot_pair(g, u, first, second));
      for (int64_t i = 0; i < count; ++i) sums[col + i] += buffer[i];
    }
  }
}

template <typename T, bool kGelu>
void swiglu_backward_row(const T* d_h, const T* gate, const T* up, int64_t cols, T* d_gate, T* d_up) {
  swiglu_backward_any<T, kGelu, false>(d_h, gate, up, cols, d_gate, d_up, nullptr);
}

template <typename T, bool kGelu>
void swiglu_backward_dot_row(
    const T* d_h, const T* gate, const T* up, int64_t cols, T* d_gate, T* d_up, float* sums) {
  swiglu_backward_any<T, kGelu, true>(d_h, gate, up, cols, d_gate, d_up, sums);
}

template <typename T, bool kGelu>
constexpr ActivationLoops<T> activation_loops() {
  return {swiglu_row<T, kGelu>, swiglu_backward_row<T, kGelu>, swiglu_backward_dot_row<T, kGelu>};
}
