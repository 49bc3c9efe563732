#include "loops.h"

#include <algorithm>
#include <cstring>

namespace atp::cpu::baseline {
#include "loops_impl.h"
#include "columns_impl.h"
}  // namespace atp::cpu::baseline
