"""C++ that goes over rows: cross-entropy, RMSNorm, the merged weight and SiLU of the gated MLP."""

from mutants.mutant import Table

SOFTMAX = "csrc/cpu/softmax_impl.h"
NORM = "csrc/cpu/norm_impl.h"
MERGE = "csrc/cpu/merge_impl.h"
ACTIVATIONS = "csrc/cpu/activations_impl.h"

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'native and (few_units or large or limits or shift)'"
TARGETS = "tests/atp_kernels/test_cross_entropy_kernel.py -k outside_the_vocabulary"
RMS = "tests/atp_kernels/test_rms_norm.py -k 'native and no_worse'"
MERGED = "tests/atp_kernels/test_merged_weight.py -k 'rounded_once or rounding'"
GATED = "tests/atp_kernels/test_native_activations.py -k 'few_units or limits or any_shape or even'"

OBSERVED = "tests/atp_kernels/test_mask_gradient.py -k gated"

TABLE: Table = {
    (ACTIVATIONS, OBSERVED): (
        ("{sum.first + dot.first, sum.second + dot.second}", "{dot.first, dot.second}"),
        ("{sum.first + dot.first, sum.second + dot.second}", "{sum.first + dot.first, sum.second}"),
        ("{d_gate.first * gate.first + d_up.first * up.first,", "{d_gate.first * gate.first,"),
        ("i < count; ++i) sums[col + i] += buffer[i];", "i < count; ++i) sums[col + i] = buffer[i];"),
    ),
    ("csrc/cpu/activations.cpp", OBSERVED): (
        ("sums_of(*sums) + i * sums->stride(0);", "sums_of(*sums);"),
        ("std::fill_n(block, cols, 0.0f);", ""),
        ("row = i * rows + first; row <", "row = first; row <"),
    ),
    (SOFTMAX, LOSS): (
        ("return -__builtin_inff();", "return 0.0f;"),
        ("return T{0xff80};", "return T{0};"),
        ("return left < right ? right : left;", "return left < right ? left : right;"),
        ("const floats t = x - largest,", "const floats t = x,"),
        ("exponential(t < bound ? bound : t)", "exponential(t)"),
        ("floats best = floats{} - __builtin_inff();", "floats best = {};"),
        ("load_pair(x + col);\n    best = larger(best, larger(pair.first, pair.second));",
         "load_pair(x + col);\n    best = larger(best, pair.first);"),
        ("load_pair(x + col);\n    best = larger(best, larger(pair.first, pair.second));",
         "load_pair(x + col);\n    best = larger(best, pair.second);"),
        ("if (col < cols) {\n    const Pair pair = load_filled", "if (false) {\n    const Pair pair = load_filled"),
        ("result = std::max(result, best[i]);", "result = best[0];"),
        ("start < cols; start += kRun", "start < 1; start += kRun"),
        ("stop = std::min(start + kRun * kSumLanes, cols);", "stop = cols;"),
        ("sums[pair].first += terms.first;", "sums[pair].first = terms.first;"),
        ("sums[pair].second += terms.second;", "sums[pair].second = terms.second;"),
        ("for (int64_t pair = 0; col < stop; ++pair", "for (int64_t pair = 0; col + kPair <= stop; ++pair"),
        ("load_filled(x + col, std::min(kPair, stop - col))", "load_filled(x + col, 1)"),
        ("totals[pair * kPair + i] += lanes[i];", "totals[pair * kPair + i] = lanes[i];"),
        ("i < kSumLanes; ++i) sum += totals[i];", "i < kSumLanes - 1; ++i) sum += totals[i];"),
        ("static_cast<float>(1.0 / sum)", "1.0f"),
        ("logit = load_pair(x + target, 1);", "logit = load_pair(x, 1);"),
        ("slope.first = slope.first * inverse - 1.0f;", "slope.first = slope.first * inverse;"),
        ("Pair{terms.first * inverse,", "Pair{terms.first,"),
        ("terms.second * inverse};", "terms.second};"),
        ("if (col < cols) store_pair(x + col, share", "if (false) store_pair(x + col, share"),
        ("store_pair(x + target, slope, 1);", ""),
        ("std::log(sum) - (static_cast", "-(static_cast"),
        ("(static_cast<double>(logit.first[0]) - largest)", "static_cast<double>(logit.first[0])"),
    ),
    ("csrc/cpu/cross_entropy.cpp", LOSS): (
        ("body(values + row * cols, cols, target[row])", "body(values + first * cols, cols, target[row])"),
        ("body(values + row * cols, cols, target[row])", "body(values + row * cols, cols, target[first])"),
    ),
    ("csrc/cpu/cross_entropy.cpp", TARGETS): (
        ("check(target[row] >= 0 && target[row] < cols,", "check(target[row] < cols,"),
        ("check(target[row] >= 0 && target[row] < cols,", "check(target[row] >= 0 && target[row] <= cols,"),
        ("for (int64_t row = 0; row < rows; ++row) {\n    check", "for (int64_t row = 0; row < 1; ++row) {\n    check"),
    ),
    (NORM, RMS): (
        ("stop = std::min(start + kRun * kLanes, cols);", "stop = cols;"),
        ("run += term(col, kLanes);", "run = term(col, kLanes);"),
        ("if (col < stop) run", "if (false) run"),
        ("total += __builtin_convertvector(run, double8);", "total = __builtin_convertvector(run, double8);"),
        ("k < kLanes; ++k) sum += total[k];", "k < kLanes - 1; ++k) sum += total[k];"),
        ("return value * value;", "return value;"),
        ("squares / static_cast<double>(cols) + eps", "squares + eps"),
        ("squares / static_cast<double>(cols) + eps", "squares / static_cast<double>(cols)"),
        ("1.0 / __builtin_sqrt(", "1.0 / ("),
        ("load_some(x + col, count) * scale * load_some(weight + col, count)",
         "load_some(x + col, count) * load_some(weight + col, count)"),
        ("load_some(x + col, count) * scale * load_some(weight + col, count)", "load_some(x + col, count) * scale"),
        ("return load_some(d_y + col, count) * load_some(weight + col, count) *",
         "return load_some(d_y + col, count) *"),
        ("load_some(weight + col, count) * load_some(x + col, count);", "load_some(weight + col, count);"),
        ("dot * wide * wide / static_cast<double>(cols)", "dot * wide / static_cast<double>(cols)"),
        ("dot * wide * wide / static_cast<double>(cols)", "dot * wide * wide"),
        ("direct = load_some(d_y + col, count) * load_some(weight + col, count);",
         "direct = load_some(d_y + col, count);"),
        ("(direct - load_some(x + col, count) * pull) * scale", "direct * scale"),
        ("(direct - load_some(x + col, count) * pull) * scale", "(direct - load_some(x + col, count) * pull)"),
    ),
    ("csrc/cpu/norm.cpp", RMS): (
        ("factors, eps, cols, to + row * cols)", "factors, 0.0, cols, to + row * cols)"),
        ("body(from + row * cols, factors", "body(from + first * cols, factors"),
        ("narrow ? ScalarType::BFloat16 : x.scalar_type()", "x.scalar_type()"),
        ("factors, scale[row], cols", "factors, scale[first], cols"),
        ("at = row * cols;", "at = first * cols;"),
    ),
    ("csrc/cpu/rows.h", RMS): (("body(begin, end - begin)", "body(begin, 1)"),),
    (MERGE, MERGED): (
        ("sums[k] = load8(weight + col + k * kLanes);", "sums[k] = float8{};"),
        ("float8{} + factors[j];", "float8{} + factors[0];"),
        ("row = lora_a + j * cols + col;", "row = lora_a + col;"),
        ("sums[k] += factor * load8(row", "sums[k] = factor * load8(row"),
        ("sums[k] += factor * load8(row", "sums[k] += load8(row"),
        ("float8 sum = load_tail(weight + col, count);", "float8 sum = {};"),
        ("sum += factors[j] * load_tail", "sum += load_tail"),
        ("load_tail(lora_a + j * cols + col, count)", "load_tail(lora_a + col, count)"),
    ),
    ("csrc/cpu/merge.cpp", MERGED): (
        ("static_cast<float>(scaling) * up", "up"),
        ("up[row * rank + j]", "up[j]"),
        ("merge_row(from + row * cols", "merge_row(from + first * cols"),
    ),
    (ACTIVATIONS, GATED): (
        ("kSaturated = 120.0f", "kSaturated = 60.0f"),
        ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
        ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u"),
        ("(floats)(both << 16), (floats)(both & 0xffff0000u)", "(floats)(both << 16), (floats)(both << 16)"),
        ("- n * -0x1.bd0106p-13f", ""),
        ("+ square * 0x1.6a1a72p-10f", ""),
        ("negated = (floats)((words)x | kSign);", "negated = x;"),
        ("t = negated < least ? least : negated;", "t = negated;"),
        ("sigmoid = (x < 0.0f ? power : one) * inverse;", "sigmoid = inverse;"),
        ("rest = (x < 0.0f ? one : power) * inverse;", "rest = power * inverse;"),
        ("*value = (x < 0.0f ? t : x) * sigmoid;", "*value = x * sigmoid;"),
        ("(1.0f + (x < 0.0f ? t : -t) * rest)", "(1.0f + t * rest)"),
        ("(1.0f + (x < 0.0f ? t : -t) * rest)", "1.0f"),
        ("return value * up;", "return value;"),
        ("*d_gate = d_h * up * slope;", "*d_gate = d_h * slope;"),
        ("*d_gate = d_h * up * slope;", "*d_gate = up * slope;"),
        ("*d_up = d_h * value;", "*d_up = value;"),
        ("if (col < cols) {\n    const int64_t count = cols - col;\n    store_pair(h",
         "if (false) {\n    const int64_t count = cols - col;\n    store_pair(h"),
        ("if (col < cols) {\n    const int64_t count = cols - col;\n    const Pair",
         "if (false) {\n    const int64_t count = cols - col;\n    const Pair"),
    ),
    ("csrc/cpu/activations.cpp", GATED): (
        ("values.const_data_ptr()), values.stride(0)};", "values.const_data_ptr()), values.size(1)};"),
        ("values.mutable_data_ptr()), values.stride(0)};", "values.mutable_data_ptr()), values.size(1)};"),
        ("cols, to_gate[row], to_up[row]);", "cols, to_up[row], to_gate[row]);"),
    ),
}  # fmt: skip
