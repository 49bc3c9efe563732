// Picks the instruction set of this processor when the library is loaded.
#include "loops.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace atp::cpu {

namespace baseline {
extern const Loops kLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}
#endif

namespace {

bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2") return __builtin_cpu_supports("avx2");
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == "baseline";
}

const Loops& pick() {
  const auto& sets = compiled_loops();
  const char* named = std::getenv("ATP_KERNELS_ISA");
  const std::string wanted = named == nullptr ? "" : named;
  for (auto set = sets.rbegin(); set != sets.rend(); ++set) {
    if ((wanted.empty() || wanted == (*set)->isa) && runs_here((*set)->isa)) return **set;
  }
  throw std::runtime_error("ATP_KERNELS_ISA='" + wanted +
                           "' names no instruction set this binary has and this processor runs; unset it.");
}

}  // namespace

const std::vector<const Loops*>& compiled_loops() {
  static const std::vector<const Loops*> sets = {
      &baseline::kLoops,
#if defined(__x86_64__)
      &avx2::kLoops,
      &avx512::kLoops,
#endif
  };
  return sets;
}

const Loops& loops() {
  static const Loops& picked = pick();
  return picked;
}

}  // namespace atp::cpu
