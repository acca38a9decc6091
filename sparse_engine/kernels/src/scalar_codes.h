// The codes of floats as they are defined, for the references.
#pragma once

#include <cmath>

#include "int8.h"

namespace sparse_engine {
namespace {

uint8_t to_code(float x, Codes codes) {
  const float code = std::nearbyint(x / codes.scale) + float(codes.zero);
  return code >= 255.0f ? 255 : code > 0.0f ? static_cast<uint8_t>(code) : 0;  // NaN: 0
}

}  // namespace
}  // namespace sparse_engine
