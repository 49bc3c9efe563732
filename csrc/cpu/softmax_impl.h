// Bodies of the loops over rows of logits, included after activations_impl.h once per instruction set.
//
// Sums go through kSumLanes partial ones, each over every kSumLanes-th element, which vectors of any width share out
// among themselves: all sets agree to the last bit.

constexpr int64_t kSumLanes = 32;
constexpr int64_t kSumPairs = kSumLanes / kPair;

template <typename T>
inline __attribute__((always_inline)) T least() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return -__builtin_inff();
  } else {
    return T{0xff80};
  }
}

// The last elements of a row, filled up with what softmax does not see.
template <typename T>
inline __attribute__((always_inline)) Pair load_filled(const T* from, int64_t count) {
  T buffer[kPair];
  std::fill(buffer, buffer + kPair, least<T>());
  std::memcpy(buffer, from, count * sizeof(T));
  return load_pair(buffer);
}

// The elements of a pair that was loaded from T, in the order that they have in memory.
template <typename T>
inline __attribute__((always_inline)) void in_order(Pair pair, float* to) {
  constexpr bool kApart = sizeof(T) != sizeof(float);
  for (int64_t i = 0; i < kVector; ++i) {
    to[kApart ? 2 * i : i] = pair.first[i];
    to[kApart ? 2 * i + 1 : kVector + i] = pair.second[i];
  }
}

inline __attribute__((always_inline)) floats larger(floats left, floats right) {
  return left < right ? right : left;
}

// exp(x - largest); a NaN passes.
inline __attribute__((always_inline)) floats shifted_exponential(floats x, float largest) {
  const floats t = x - largest, bound = floats{} - kSaturated;
  return exponential(t < bound ? bound : t);
}

inline __attribute__((always_inline)) Pair shifted_exponentials(Pair x, float largest) {
  return {shifted_exponential(x.first, largest), shifted_exponential(x.second, largest)};
}

template <typename T>
float row_max(const T* x, int64_t cols) {
  floats best = floats{} - __builtin_inff();
  int64_t col = 0;
  for (; col + kPair <= cols; col += kPair) {
    const Pair pair = load_pair(x + col);
    best = larger(best, larger(pair.first, pair.second));
  }
  if (col < cols) {
    const Pair pair = load_filled(x + col, cols - col);
    best = larger(best, larger(pair.first, pair.second));
  }
  float result = best[0];
  for (int64_t i = 1; i < kVector; ++i) result = std::max(result, best[i]);
  return result;
}

// The sum of exp(x - largest) over a row: float32 over runs of kRun in each lane, float64 over the runs.
template <typename T>
double exponential_sum(const T* x, int64_t cols, float largest) {
  double totals[kSumLanes] = {};
  for (int64_t start = 0; start < cols; start += kRun * kSumLanes) {
    const int64_t stop = std::min(start + kRun * kSumLanes, cols);
    Pair sums[kSumPairs] = {};
    const auto add = [&](int64_t pair, Pair logits) {
      const Pair terms = shifted_exponentials(logits, largest);
      sums[pair].first += terms.first;
      sums[pair].second += terms.second;
    };
    int64_t col = start;
    for (; col + kSumLanes <= stop; col += kSumLanes) {
      for (int64_t pair = 0; pair < kSumPairs; ++pair) add(pair, load_pair(x + col + pair * kPair));
    }
    for (int64_t pair = 0; col < stop; ++pair, col += kPair) {
      add(pair, load_filled(x + col, std::min(kPair, stop - col)));
    }
    for (int64_t pair = 0; pair < kSumPairs; ++pair) {
      float lanes[kPair];
      in_order<T>(sums[pair], lanes);
      for (int64_t i = 0; i < kPair; ++i) totals[pair * kPair + i] += lanes[i];
    }
  }
  double sum = 0;
  for (int64_t i = 0; i < kSumLanes; ++i) sum += totals[i];
  return sum;
}

// Returns -log softmax(x)[target] and writes softmax(x) - onehot(target) over x, rounded once.
template <typename T>
double cross_entropy_row(T* x, int64_t cols, int64_t target) {
  const float largest = row_max(x, cols);
  const double sum = exponential_sum(x, cols, largest);
  const float inverse = static_cast<float>(1.0 / sum);
  const Pair logit = load_pair(x + target, 1);
  Pair slope = shifted_exponentials(logit, largest);
  slope.first = slope.first * inverse - 1.0f;

  const auto share = [&](Pair logits) {
    const Pair terms = shifted_exponentials(logits, largest);
    return Pair{terms.first * inverse, terms.second * inverse};
  };
  int64_t col = 0;
  for (; col + kPair <= cols; col += kPair) store_pair(x + col, share(load_pair(x + col)));
  if (col < cols) store_pair(x + col, share(load_pair(x + col, cols - col)), cols - col);
  store_pair(x + target, slope, 1);
  return std::log(sum) - (static_cast<double>(logit.first[0]) - largest);
}

template <typename T>
constexpr SoftmaxLoops<T> softmax_loops() {
  return {cross_entropy_row<T>};
}
