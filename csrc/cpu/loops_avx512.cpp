// The inner loops for AVX-512.
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace atp::cpu::avx512 {
constexpr const char* kIsa = "avx512";
constexpr int64_t kVectorBytes = 64;

#include "loops_impl.h"
#include "activations_impl.h"
#include "softmax_impl.h"
#include "merge_impl.h"
#include "norm_impl.h"
#include "attention_impl.h"
#include "columns_impl.h"
}  // namespace atp::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
