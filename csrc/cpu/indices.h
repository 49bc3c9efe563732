// What the gathers of a CPU share: the check of their indices, the element type, and the row of a gather.
#pragma once

#include "../common.h"

#include <vector>

namespace atp::cpu {

inline void check_range(const int64_t* index, int64_t count, int64_t size, const char* name) {
  if (index == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    check(index[i] >= 0 && index[i] < size, name, "[", i, "] is ", index[i], ", outside [0, ", size, ").");
  }
}

// Checked indices of columns in 32 bits: they stay in the first-level cache beside the row that is gathered, which took
// two thirds of the time that 64 bits took (float32, 4096 columns).
inline std::vector<uint32_t> columns(const int64_t* index, int64_t count, int64_t size, const char* name) {
  check_range(index, count, size, name);
  return std::vector<uint32_t>(index, index + count);
}

// A copy depends on an element's size alone: calls body(T{}) with the unsigned integer T of that size.
template <typename Body>
void with_bits(const Tensor& values, const char* op, const Body& body) {
  switch (values.element_size()) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: check(false, op, " takes elements of 1, 2, 4 or 8 bytes.");
  }
}

template <typename T, typename Index>
void take(const T* row, const Index* index, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = row[index[i]];
}

}  // namespace atp::cpu
