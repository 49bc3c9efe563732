// Bodies of the loops around the masked linear, included last and once per instruction set: float32 inside, one rounding
// at the end, no contraction, so that all sets agree to the last bit.

// Counters whose four words are drawn together.
constexpr int64_t kQuads = 16;
constexpr int kPhiloxRounds = 7;

template <typename T>
void mask_rows(const T* x, int64_t rows, int64_t cols, const float* mask, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += cols, out += cols) {
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) store8(out + col, load8(x + col) * load8(mask + col));
    if (col < cols) {
      const int64_t count = cols - col;
      store_tail(out + col, load_tail(x + col, count) * load_tail(mask + col, count), count);
    }
  }
}

template <typename T>
void dot_rows(const T* left, const T* right, int64_t rows, int64_t cols, float* sums) {
  std::fill(sums, sums + cols, 0.0f);
  for (int64_t row = 0; row < rows; ++row, left += cols, right += cols) {
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) {
      store8(sums + col, load8(sums + col) + load8(left + col) * load8(right + col));
    }
    if (col < cols) {
      const int64_t count = cols - col;
      const float8 product = load_tail(left + col, count) * load_tail(right + col, count);
      store_tail(sums + col, load_tail(sums + col, count) + product, count);
    }
  }
}

template <typename T>
void mask_and_dot_rows(
    const T* grad, const T* total, int64_t rows, int64_t cols, const float* mask, T* out, float* sums) {
  std::fill(sums, sums + cols, 0.0f);
  for (int64_t row = 0; row < rows; ++row, grad += cols, total += cols, out += cols) {
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) {
      const float8 value = load8(grad + col);
      store8(out + col, value * load8(mask + col));
      store8(sums + col, load8(sums + col) + value * load8(total + col));
    }
    if (col < cols) {
      const int64_t count = cols - col;
      const float8 value = load_tail(grad + col, count);
      store_tail(out + col, value * load_tail(mask + col, count), count);
      store_tail(sums + col, load_tail(sums + col, count) + value * load_tail(total + col, count), count);
    }
  }
}

// words[4 * i + w] is word w of Philox-4x32-7 with counter (row, first + i, 0, 0) (Salmon et al. 2011, section 3.3).
inline void philox(uint32_t row, uint32_t first, uint32_t key_low, uint32_t key_high, uint32_t* words) {
  uint32_t c0[kQuads], c1[kQuads], c2[kQuads], c3[kQuads];
  for (uint32_t i = 0; i < kQuads; ++i) {
    c0[i] = row;
    c1[i] = first + i;
    c2[i] = c3[i] = 0;
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t i = 0; i < kQuads; ++i) {
      const uint64_t left = uint64_t{c0[i]} * 0xD2511F53u, right = uint64_t{c2[i]} * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(right >> 32) ^ c1[i] ^ key_low;
      c1[i] = static_cast<uint32_t>(right);
      c2[i] = static_cast<uint32_t>(left >> 32) ^ c3[i] ^ key_high;
      c3[i] = static_cast<uint32_t>(left);
    }
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < kQuads; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// All ones in the lanes of an element that is kept.
inline __attribute__((always_inline)) int8x32 kept8(const uint32_t* words, uint32_t threshold) {
  uint8x32 drawn;
  std::memcpy(&drawn, words, sizeof drawn);
  return (int8x32)(drawn >= threshold);
}

template <typename T>
void drop_row(const T* x, int64_t cols, uint32_t row, const Drop& drop, T* out) {
  uint32_t words[4 * kQuads];
  for (int64_t start = 0; start < cols; start += 4 * kQuads) {
    philox(row, static_cast<uint32_t>(start / 4), drop.key_low, drop.key_high, words);
    const int64_t stop = std::min(start + 4 * kQuads, cols);
    int64_t col = start;
    for (; col + kLanes <= stop; col += kLanes) {
      const int8x32 kept = kept8(words + col - start, drop.threshold);
      store8(out + col, (float8)((int8x32)(load8(x + col) * drop.scale) & kept));
    }
    if (col < stop) {
      const int8x32 kept = kept8(words + col - start, drop.threshold);
      const float8 value = load_tail(x + col, stop - col) * drop.scale;
      store_tail(out + col, (float8)((int8x32)value & kept), stop - col);
    }
  }
}

template <typename T>
constexpr ColumnLoops<T> column_loops() {
  return {mask_rows<T>, dot_rows<T>, mask_and_dot_rows<T>, drop_row<T>};
}

// Constant data: the code of an instruction set runs only once that set is picked.
extern const Loops kLoops;
constexpr Loops kLoops = {
    kIsa,
    group_sums,
    run_sums,
    group_norms,
    group_slopes,
    slot_slopes,
    slot_norms,
    merge_row,
    group_loops<float>(),
    group_loops<bfloat16>(),
    column_loops<float>(),
    column_loops<bfloat16>(),
    {activation_loops<float, false>(), activation_loops<float, true>()},
    {activation_loops<bfloat16, false>(), activation_loops<bfloat16, true>()},
    softmax_loops<float>(),
    softmax_loops<bfloat16>(),
    norm_loops<float, float>(),
    norm_loops<float, bfloat16>(),
    norm_loops<bfloat16, float>(),
    norm_loops<bfloat16, bfloat16>(),
    attention_loops(),
};
