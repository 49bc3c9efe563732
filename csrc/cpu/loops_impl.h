// Bodies of the inner loops. Included once per instruction set, inside a namespace of its own and under the
// compiler's target pragma, so no include guard and no includes here.
//
// All sets share one summation order and none contracts a multiply and an add (-ffp-contract=off): a result is the
// same to the last bit on every processor that runs this source.

typedef float float8 __attribute__((vector_size(32)));
typedef uint32_t uint8x32 __attribute__((vector_size(32)));
typedef int32_t int8x32 __attribute__((vector_size(32)));
typedef uint16_t uint8x16 __attribute__((vector_size(16)));

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

inline __attribute__((always_inline)) float sum8(float8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <typename T>
void row_squares(const T* x, int64_t rows, int64_t cols, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += cols) {
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
    out[row] = sum8(even + odd);
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
GroupLoops<T> group_loops() {
  return {row_squares<T>, column_squares<T>, scale_rows<T>, scale_columns<T>};
}

Loops make_loops(const char* isa) {
  return {isa, group_loops<float>(), group_loops<bfloat16>()};
}
