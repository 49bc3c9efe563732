// The inner loops for any processor.
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace atp::cpu::baseline {
constexpr const char* kIsa = "baseline";
constexpr int64_t kVectorBytes = 16;

#include "loops_impl.h"
#include "activations_impl.h"
#include "softmax_impl.h"
#include "merge_impl.h"
#include "norm_impl.h"
#include "attention_impl.h"
#include "columns_impl.h"
}  // namespace atp::cpu::baseline
