// What every operation shares: the stable-ABI types and the error helper.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace atp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python) with the streamed parts as its one sentence.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace atp
