// The inner loops for AVX2.
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace atp::cpu::avx2 {
constexpr const char* kIsa = "avx2";
constexpr int64_t kVectorBytes = 32;

#include "loops_impl.h"
#include "activations_impl.h"
#include "softmax_impl.h"
#include "merge_impl.h"
#include "norm_impl.h"
#include "attention_impl.h"
#include "columns_impl.h"
}  // namespace atp::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
