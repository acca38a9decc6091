// What this machine's processor and operating system can run.
#pragma once

#include "matmul24.h"

namespace sparse_engine {

bool machine_has(Tier tier);

}  // namespace sparse_engine
