// Bodies of the inner loops. Included once per instruction set, inside a namespace of its own and under the
// compiler's target pragma, so no include guard and no includes here.
//
// All sets share one summation order and none contracts a multiply and an add (-ffp-contract=off): a result is the
// same to the last bit on every processor that runs this source.

typedef float float8 __attribute__((vector_size(32)));
typedef uint32_t uint8x32 __attribute__((vector_size(32)));
typedef int32_t int8x32 __attribute__((vector_size(32)));
typedef double double8 __attribute__((vector_size(64)));
typedef int8_t int8x8 __attribute__((vector_size(8)));
typedef uint16_t uint8x16 __attribute__((vector_size(16)));

#ifndef ATP_SHUFFLE
#ifdef __clang__
#define ATP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ATP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, int8x32{__VA_ARGS__})
#endif
#endif

constexpr int64_t kLanes = 8;
constexpr int64_t kColumnVectors = 4;
// Longest run that one float32 accumulator sums before it is folded into the total.
constexpr int64_t kRun = 128;

inline __attribute__((always_inline)) float8 load8(const float* from) {
  float8 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline __attribute__((always_inline)) float8 load8(const bfloat16* from) {
  uint8x16 half;
  std::memcpy(&half, from, sizeof half);
  return (float8)(__builtin_convertvector(half, uint8x32) << 16);
}

inline __attribute__((always_inline)) void store8(float* to, float8 value) {
  std::memcpy(to, &value, sizeof value);
}

inline __attribute__((always_inline)) void store8(bfloat16* to, float8 value) {
  const uint8x32 bits = (uint8x32)value;
  const uint8x32 nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint8x32 nan = (uint8x32)(value != value);
  const uint8x16 half = __builtin_convertvector((nearest_even & ~nan) | (nan & 0x7fc0u), uint8x16);
  std::memcpy(to, &half, sizeof half);
}

inline __attribute__((always_inline)) float8 scaled(float8 value, float8 scale) {
  return (float8)((int8x32)(value * scale) & (int8x32)(scale != 0.0f));
}

// At the origin (norm 0, possible only with eps = 0) zero is the subgradient of least norm.
inline __attribute__((always_inline)) float8 slope8(float upstream, float8 norm) {
  return (float8)((int8x32)(upstream / norm) & (int8x32)(norm != 0.0f));
}

// The last 1 to 7 elements travel through a zero-filled vector, so they round exactly as the others do.
template <typename T>
inline __attribute__((always_inline)) float8 load_tail(const T* from, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load8(buffer);
}

template <typename T>
inline __attribute__((always_inline)) void store_tail(T* to, float8 value, int64_t count) {
  T buffer[kLanes];
  store8(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

inline __attribute__((always_inline)) int8x32 load_ids(const int32_t* from, int64_t count) {
  int8x32 ids = {};
  std::memcpy(&ids, from, count == kLanes ? sizeof ids : count * sizeof(int32_t));
  return ids;
}

// All ones in the lanes whose flag is set.
inline __attribute__((always_inline)) int8x32 load_flags(const bool* from, int64_t count) {
  int8x8 flags = {};
  std::memcpy(&flags, from, count == kLanes ? sizeof flags : count);
  return -__builtin_convertvector(flags, int8x32);
}

// Lane k of the result is the sum of the lanes of v[k]: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
inline __attribute__((always_inline)) float8 sum_lanes(const float8* v) {
  float8 fours[4], twos[2];
  for (int64_t k = 0; k < 4; ++k) {
    fours[k] = ATP_SHUFFLE(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
               ATP_SHUFFLE(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int64_t k = 0; k < 2; ++k) {
    twos[k] = ATP_SHUFFLE(fours[k], fours[k + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
              ATP_SHUFFLE(fours[k], fours[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return ATP_SHUFFLE(twos[0], twos[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         ATP_SHUFFLE(twos[0], twos[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

template <typename T>
inline __attribute__((always_inline)) float8 lane_squares(const T* x, int64_t cols) {
  float8 even = {}, odd = {};
  int64_t col = 0;
  for (; col + 2 * kLanes <= cols; col += 2 * kLanes) {
    const float8 left = load8(x + col), right = load8(x + col + kLanes);
    even += left * left;
    odd += right * right;
  }
  if (col + kLanes <= cols) {
    const float8 value = load8(x + col);
    even += value * value;
    col += kLanes;
  }
  if (col < cols) {
    const float8 value = load_tail(x + col, cols - col);
    odd += value * value;
  }
  return even + odd;
}

template <typename T>
void row_squares(const T* x, int64_t rows, int64_t cols, float* out) {
  int64_t row = 0;
  for (; row + kLanes <= rows; row += kLanes) {
    float8 lanes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = lane_squares(x + (row + k) * cols, cols);
    store8(out + row, sum_lanes(lanes));
  }
  if (row < rows) {
    float8 lanes[kLanes] = {};
    for (int64_t k = 0; k < rows - row; ++k) lanes[k] = lane_squares(x + (row + k) * cols, cols);
    store_tail(out + row, sum_lanes(lanes), rows - row);
  }
}

template <typename T>
void column_squares(const T* x, int64_t rows, int64_t cols, int64_t stride, float* out) {
  int64_t col = 0;
  for (; col + kColumnVectors * kLanes <= cols; col += kColumnVectors * kLanes) {
    float8 total[kColumnVectors] = {};
    for (int64_t start = 0; start < rows; start += kRun) {
      float8 run[kColumnVectors] = {};
      const int64_t stop = std::min(start + kRun, rows);
      for (int64_t row = start; row < stop; ++row) {
        for (int64_t k = 0; k < kColumnVectors; ++k) {
          const float8 value = load8(x + row * stride + col + k * kLanes);
          run[k] += value * value;
        }
      }
      for (int64_t k = 0; k < kColumnVectors; ++k) total[k] += run[k];
    }
    for (int64_t k = 0; k < kColumnVectors; ++k) store8(out + col + k * kLanes, total[k]);
  }
  for (; col < cols; col += kLanes) {
    const int64_t count = std::min(kLanes, cols - col);
    float8 total = {};
    for (int64_t start = 0; start < rows; start += kRun) {
      float8 run = {};
      const int64_t stop = std::min(start + kRun, rows);
      for (int64_t row = start; row < stop; ++row) {
        const float8 value = load_tail(x + row * stride + col, count);
        run += value * value;
      }
      total += run;
    }
    store_tail(out + col, total, count);
  }
}

template <typename T>
void scale_rows(const T* x, int64_t rows, int64_t cols, const float* scale, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += cols, out += cols) {
    if (scale[row] == 1.0f && x == out) continue;
    const float8 factor = float8{} + scale[row];
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) store8(out + col, scaled(load8(x + col), factor));
    if (col < cols) store_tail(out + col, scaled(load_tail(x + col, cols - col), factor), cols - col);
  }
}

template <typename T>
void scale_columns(const T* x, int64_t rows, int64_t cols, int64_t stride, const float* scale, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += stride, out += stride) {
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) store8(out + col, scaled(load8(x + col), load8(scale + col)));
    if (col < cols) {
      const int64_t count = cols - col;
      store_tail(out + col, scaled(load_tail(x + col, count), load_tail(scale + col, count)), count);
    }
  }
}

template <typename T>
inline __attribute__((always_inline)) void add_scaled8(const T* x, float8 scale, T* out) {
  store8(out, load8(out) + scaled(load8(x), scale));
}

template <typename T>
inline __attribute__((always_inline)) void add_scaled_tail(const T* x, float8 scale, T* out, int64_t count) {
  store_tail(out, load_tail(out, count) + scaled(load_tail(x, count), scale), count);
}

template <typename T>
void add_scaled_rows(const T* x, int64_t rows, int64_t cols, const float* scale, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += cols, out += cols) {
    const float8 factor = float8{} + scale[row];
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) add_scaled8(x + col, factor, out + col);
    if (col < cols) add_scaled_tail(x + col, factor, out + col, cols - col);
  }
}

template <typename T>
void add_scaled_columns(const T* x, int64_t rows, int64_t cols, int64_t stride, const float* scale, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += stride, out += stride) {
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) add_scaled8(x + col, load8(scale + col), out + col);
    if (col < cols) add_scaled_tail(x + col, load_tail(scale + col, cols - col), out + col, cols - col);
  }
}

void group_sums(const float* squares, const int32_t* order, const int32_t* starts, int64_t count, double* sums) {
  for (int64_t group = 0; group < count; ++group) {
    double sum = 0;
    for (int32_t i = starts[group]; i < starts[group + 1]; ++i) sum += squares[order[i]];
    sums[group] = sum;
  }
}

void run_sums(const float* squares, const int32_t* starts, int64_t count, double* sums) {
  const float* square = squares;
  for (int64_t group = 0; group < count; ++group) {
    double sum = 0;
    for (int32_t i = starts[group]; i < starts[group + 1]; ++i) sum += *square++;
    sums[group] = sum;
  }
}

// No branch on `removed` here and below: which groups are removed is as good as random to the processor.
double group_norms(
    const double* sums, const int32_t* starts, const bool* removed, int64_t count, double eps, float* norms) {
  for (int64_t group = 0; group < count; ++group) {
    norms[group] = __builtin_sqrtf(static_cast<float>(sums[group] + eps));
  }
  double8 total = {};
  for (int64_t group = 0; group < count; group += kLanes) {
    const int64_t here = std::min(kLanes, count - group);
    const int8x32 begin = load_ids(starts + group, here), end = load_ids(starts + group + 1, here);
    const int8x32 counted = (end > begin) & load_flags(removed + group, here);
    const float8 norm = here == kLanes ? load8(norms + group) : load_tail(norms + group, here);
    total += __builtin_convertvector((float8)((int8x32)norm & counted), double8);
  }
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += total[k];
  return sum;
}

void group_slopes(const bool* removed, int64_t count, float upstream, float* norms) {
  for (int64_t group = 0; group < count; group += kLanes) {
    const int64_t here = std::min(kLanes, count - group);
    const float8 norm = here == kLanes ? load8(norms + group) : load_tail(norms + group, here);
    const float8 slope = slope8(upstream, (float8)((int8x32)norm & load_flags(removed + group, here)));
    here == kLanes ? store8(norms + group, slope) : store_tail(norms + group, slope, here);
  }
}

void slot_slopes(
    const int32_t* index, int64_t count, const bool* removed, const float* norms, float upstream, float* out) {
  for (int64_t slot = 0; slot < count; ++slot) {
    const int32_t group = index[slot];
    uint32_t bits;
    std::memcpy(&bits, norms + group, sizeof bits);
    bits &= 0u - removed[group];
    std::memcpy(out + slot, &bits, sizeof bits);
  }
  int64_t slot = 0;
  for (; slot + kLanes <= count; slot += kLanes) store8(out + slot, slope8(upstream, load8(out + slot)));
  if (slot < count) store_tail(out + slot, slope8(upstream, load_tail(out + slot, count - slot)), count - slot);
}

// The arithmetic of group_norms and slot_slopes in one sweep. A last vector that is not full counts no lane too many,
// because flags that are not there load as not removed.
double slot_norms(
    const float* squares, const bool* removed, int64_t count, double eps, float upstream, float* slopes) {
  double8 total = {};
  for (int64_t slot = 0; slot < count; slot += kLanes) {
    const int64_t here = std::min(kLanes, count - slot);
    const float8 square = here == kLanes ? load8(squares + slot) : load_tail(squares + slot, here);
    const float8 sum = __builtin_convertvector(__builtin_convertvector(square, double8) + eps, float8);
    float8 root = sum;
    for (int64_t k = 0; k < kLanes; ++k) root[k] = __builtin_sqrtf(sum[k]);
    const float8 norm = (float8)((int8x32)root & load_flags(removed + slot, here));
    total += __builtin_convertvector(norm, double8);
    const float8 slope = slope8(upstream, norm);
    here == kLanes ? store8(slopes + slot, slope) : store_tail(slopes + slot, slope, here);
  }
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += total[k];
  return sum;
}

template <typename T>
constexpr GroupLoops<T> group_loops() {
  return {row_squares<T>, column_squares<T>, scale_rows<T>, scale_columns<T>, add_scaled_rows<T>, add_scaled_columns<T>};
}
