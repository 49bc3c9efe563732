// Body of the loop that merges an adapter into a weight, included after loops_impl.h once per instruction set.

// out = weight + the sum over j of factors[j] * lora_a[j], one row of a weight and all of a [rank, cols] adapter.
inline void merge_row(
    const float* weight, const float* lora_a, const float* factors, int64_t rank, int64_t cols, bfloat16* out) {
  int64_t col = 0;
  for (; col + kColumnVectors * kLanes <= cols; col += kColumnVectors * kLanes) {
    float8 sums[kColumnVectors];
    for (int64_t k = 0; k < kColumnVectors; ++k) sums[k] = load8(weight + col + k * kLanes);
    for (int64_t j = 0; j < rank; ++j) {
      const float8 factor = float8{} + factors[j];
      const float* row = lora_a + j * cols + col;
      for (int64_t k = 0; k < kColumnVectors; ++k) sums[k] += factor * load8(row + k * kLanes);
    }
    for (int64_t k = 0; k < kColumnVectors; ++k) store8(out + col + k * kLanes, sums[k]);
  }
  for (; col < cols; col += kLanes) {
    const int64_t count = std::min(kLanes, cols - col);
    float8 sum = load_tail(weight + col, count);
    for (int64_t j = 0; j < rank; ++j) sum += factors[j] * load_tail(lora_a + j * cols + col, count);
    store_tail(out + col, sum, count);
  }
}
