#include "dispatch.h"

#include <cstdlib>

#include "cpu_features.h"
#include "error.h"

namespace sparse_engine {
namespace {

constexpr const char* kTierNames[kTierCount] = {"scalar",      "avx2",        "avx-vnni", "avx512",
                                                "avx512-vnni", "avx512-bf16", "neon",     "neon-dot"};
constexpr const char* kLanesNames[] = {"t-lanes", "n-lanes", "r-lanes"};
constexpr const char* kActivationNames[] = {"none", "gelu", "gelu-tanh", "silu"};
constexpr const char* kComputeNames[] = {"fp32", "bf16"};
constexpr const char* kElementNames[] = {"fp32", "bf16", "codes"};

template <size_t Count>
int parse(const char* what, const std::string& name, const char* const (&names)[Count]) {
  std::string listed;
  for (size_t i = 0; i < Count; ++i) {
    if (name == names[i]) return int(i);
    listed += (i ? ", " : "") + std::string(names[i]);
  }
  throw Error(Status::kInvalidInput, std::string(what) + " is '" + name + "', expected one of: " + listed);
}

void require(Tier tier, const std::string& asked_by) {
  if (machine_has(tier)) return;
  throw Error(Status::kUnsupported,
              asked_by + " asks for " + tier_name(tier) + ", which this machine or its operating system lacks");
}

void require_floats(Tier tier) {
  require(tier, "the caller");
  if (tier != Tier::kAvx512Vnni && tier != Tier::kAvxVnni && tier != Tier::kNeonDot) return;
  throw Error(Status::kUnsupported, std::string(tier_name(tier)) + " computes 8-bit products, and nothing else");
}

// Of lanes that a tier's products, or convolutions, do not have.
void require_lanes(const char* what, Tier tier, Lanes lanes, bool exist) {
  if (exist) return;
  throw Error(Status::kUnsupported,
              std::string(what) + " in " + lanes_name(lanes) + " are not computed on " + tier_name(tier));
}

}  // namespace

const char* tier_name(Tier tier) { return kTierNames[int(tier)]; }
const char* lanes_name(Lanes lanes) { return kLanesNames[int(lanes)]; }

Tier parse_tier(const std::string& name) { return Tier(parse("the instruction-set tier", name, kTierNames)); }
Lanes parse_lanes(const std::string& name) { return Lanes(parse("the tactic", name, kLanesNames)); }
Activation parse_activation(const std::string& name) {
  return Activation(parse("the activation", name, kActivationNames));
}
Element parse_element(const std::string& name) { return Element(parse("the output", name, kElementNames)); }
bool parse_compute_is_bfloat16(const std::string& name) {
  return parse("the compute precision", name, kComputeNames) == 1;
}

Tier highest_tier() {
  const char* const forced = std::getenv("SPARSE_ENGINE_ISA");
  if (forced && *forced) {
    const Tier tier = Tier(parse("SPARSE_ENGINE_ISA", forced, kTierNames));
    require(tier, "SPARSE_ENGINE_ISA");
    return tier;
  }
  int tier = kTierCount - 1;
  while (!machine_has(Tier(tier))) --tier;
  return Tier(tier);
}

Tier best_tier(bool bfloat16) {
  const Tier highest = highest_tier();
  const bool wider = highest == Tier::kAvx512Bf16 || highest == Tier::kAvx512Vnni;
  if (!bfloat16 && highest == Tier::kNeonDot) return Tier::kNeon;
  if (!bfloat16) return wider ? Tier::kAvx512 : highest == Tier::kAvxVnni ? Tier::kAvx2 : highest;
  if (highest == Tier::kAvx512Bf16) return highest;
  throw Error(Status::kUnsupported,
              std::string("bf16 products need AVX512-BF16; the highest tier here is ") + tier_name(highest));
}

Tier best_int8_tier() {
  const Tier highest = highest_tier();
  if (highest == Tier::kNeonDot) return highest;
  const bool wider = highest == Tier::kAvx512Bf16 || highest == Tier::kAvx512Vnni;
  if (wider && machine_has(Tier::kAvx512Vnni)) return Tier::kAvx512Vnni;
  const bool allowed = wider || highest == Tier::kAvx512 || highest == Tier::kAvxVnni;
  return allowed && machine_has(Tier::kAvxVnni) ? Tier::kAvxVnni : Tier::kScalar;
}

const TacticInt8& find_int8_tactic(Tier tier) {
  require(tier, "the caller");
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx512Vnni) return kAvx512VnniInt8;
  if (tier == Tier::kAvxVnni) return kAvxVnniInt8;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeonDot) return kNeonDotInt8;
#endif
  if (tier == Tier::kScalar) return kScalarInt8;
  throw Error(Status::kUnsupported, std::string("8-bit products are not computed on ") + tier_name(tier));
}

const ConvTacticInt8& find_conv_int8_tactic(Tier tier) {
  require(tier, "the caller");
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx512Vnni) return kAvx512VnniConvInt8;
  if (tier == Tier::kAvxVnni) return kAvxVnniConvInt8;
#endif
  if (tier == Tier::kScalar) return kScalarConvInt8;
  throw Error(Status::kUnsupported, std::string("8-bit convolutions are not computed on ") + tier_name(tier));
}

const ConvTacticInt8& best_conv_int8_tactic() {
  const Tier tier = best_int8_tier();
  const bool has = tier == Tier::kAvx512Vnni || tier == Tier::kAvxVnni;
  return find_conv_int8_tactic(has ? tier : Tier::kScalar);
}

const Tactic& find_tactic(Tier tier, Lanes lanes) {
  require_floats(tier);
  require_lanes("products", tier, lanes, lanes != Lanes::kRegisters);
  [[maybe_unused]] const bool rows = lanes == Lanes::kRows;
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx2) return rows ? kAvx2Rows : kAvx2Tokens;
  if (tier == Tier::kAvx512) return rows ? kAvx512Rows : kAvx512Tokens;
  if (tier == Tier::kAvx512Bf16) return rows ? kAvx512Bf16Rows : kAvx512Bf16Tokens;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeon) return rows ? kNeonRows : kNeonTokens;
#endif
  return kScalarTactic;
}

const Tactic& find_dense_tactic(Tier tier) {
  require(tier, "the caller");
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx512Bf16) return kAvx512Bf16Dense;
#endif
  throw Error(Status::kUnsupported, std::string("dense products are computed in bf16 only, not on ") + tier_name(tier));
}

const TacticBf16& find_bf16_tactic() {
  [[maybe_unused]] const Tier tier = best_tier(true);  // there is one
#ifdef SPARSE_ENGINE_X86
  return kAvx512Bf16Layers;
#else
  throw Error(Status::kUnsupported, std::string("layers in bf16 are not computed on ") + tier_name(tier));
#endif
}

const ConvTactic& find_conv_tactic(Tier tier, Lanes lanes) {
  require_floats(tier);
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx512Bf16 && lanes == Lanes::kRegisters) return kAvx512Bf16ConvRegisters;
#endif
  require_lanes("convolutions", tier, lanes, lanes != Lanes::kRegisters);
  [[maybe_unused]] const bool rows = lanes == Lanes::kRows;
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx2) return rows ? kAvx2ConvRows : kAvx2Conv;
  if (tier == Tier::kAvx512) return rows ? kAvx512ConvRows : kAvx512Conv;
  if (tier == Tier::kAvx512Bf16) return rows ? kAvx512Bf16ConvRows : kAvx512Bf16Conv;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeon) return rows ? kNeonConvRows : kNeonConv;
#endif
  return kScalarConv;
}

const PeakLoop* find_peak_loop(Tier tier) {
  require(tier, "the caller");
#ifdef SPARSE_ENGINE_X86
  if (tier == Tier::kAvx2) return &kAvx2Peak;
  if (tier == Tier::kAvx512) return &kAvx512Peak;
  if (tier == Tier::kAvx512Vnni) return &kAvx512VnniPeak;
  if (tier == Tier::kAvx512Bf16) return &kAvx512Bf16Peak;
#endif
#ifdef SPARSE_ENGINE_NEON
  if (tier == Tier::kNeon) return &kNeonPeak;
#endif
  return nullptr;
}

}  // namespace sparse_engine
