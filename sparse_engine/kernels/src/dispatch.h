// Names, and the choice of a tactic for this machine.
#pragma once

#include <string>

#include "conv24.h"
#include "conv_int8.h"
#include "int8.h"
#include "layers_bf16.h"
#include "matmul24.h"

namespace sparse_engine {

const char* tier_name(Tier tier);
const char* lanes_name(Lanes lanes);

// Each throws Error(kInvalidInput) for a name that is not one of those listed.
Tier parse_tier(const std::string& name);                 // scalar, avx2, avx-vnni, avx512, avx512-vnni, ...
Lanes parse_lanes(const std::string& name);               // t-lanes, n-lanes, r-lanes
Activation parse_activation(const std::string& name);     // none, gelu, gelu-tanh, silu
Element parse_element(const std::string& name);           // fp32, bf16, codes
bool parse_compute_is_bfloat16(const std::string& name);  // fp32, bf16

// The highest tier that may be used: the machine's, or the one that SPARSE_ENGINE_ISA forces.
// Throws Error(kUnsupported) where the machine lacks the forced tier.
Tier highest_tier();

// The fastest tier for products of that precision. bf16 has one, and no substitute: Error(kUnsupported).
Tier best_tier(bool bfloat16);

// The fastest tier for 8-bit products; scalar where there is no other.
Tier best_int8_tier();

// For 2:4 products. Throws Error(kUnsupported) where the machine lacks the tier, or the tier the lanes.
const Tactic& find_tactic(Tier tier, Lanes lanes);

// For dense weights; there is one, in bf16. Throws Error(kUnsupported) for any other tier.
const Tactic& find_dense_tactic(Tier tier);

// For layers in bf16 with all that surrounds them. Throws as best_tier(true).
const TacticBf16& find_bf16_tactic();

// For 8-bit products. Throws Error(kUnsupported) where the machine lacks the tier, or the tier has none.
const TacticInt8& find_int8_tactic(Tier tier);

// For 8-bit convolutions. Throws Error(kUnsupported) where the machine lacks the tier, or the tier has none.
const ConvTacticInt8& find_conv_int8_tactic(Tier tier);

// The fastest one; scalar where there is no other.
const ConvTacticInt8& best_conv_int8_tactic();

// For 2:4 convolutions. Throws Error(kUnsupported) where the machine lacks the tier, or the tier the lanes.
const ConvTactic& find_conv_tactic(Tier tier, Lanes lanes);

// Null for the scalar tier. Throws Error(kUnsupported) where the machine lacks the tier.
const PeakLoop* find_peak_loop(Tier tier);

}  // namespace sparse_engine
