#include "cpu_features.h"

#ifdef SPARSE_ENGINE_X86
#include <cpuid.h>
#elif defined(SPARSE_ENGINE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SPARSE_ENGINE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sparse_engine {

#ifdef SPARSE_ENGINE_X86
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

constexpr bool has_bits(unsigned value, unsigned mask) { return (value & mask) == mask; }
constexpr unsigned bit(int index) { return 1u << index; }

// The register state that the operating system saves on a task switch. A processor may have AVX-512 while the
// system does not save its registers: CPUID alone would promise instructions that fault.
unsigned saved_state() {
  constexpr unsigned kOsxsave = bit(27);
  if (!has_bits(cpuid(1, 0).ecx, kOsxsave)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

struct Features {
  bool avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16;

  Features() {
    constexpr unsigned kSseAndAvxState = bit(1) | bit(2);
    constexpr unsigned kAvx512State = bit(5) | bit(6) | bit(7);  // masks, upper halves, registers 16 to 31
    constexpr unsigned kAvxAndFma = bit(28) | bit(12);           // leaf 1, ecx
    constexpr unsigned kAvx2 = bit(5);                           // leaf 7, ebx
    constexpr unsigned kAvxVnni = bit(4);                        // leaf 7 subleaf 1, eax
    constexpr unsigned kAvx512FDqBwVl = bit(16) | bit(17) | bit(30) | bit(31);  // leaf 7, ebx
    constexpr unsigned kAvx512VbmiVnni = bit(1) | bit(11);                      // leaf 7, ecx
    constexpr unsigned kAvx512Bf16 = bit(5);                                    // leaf 7 subleaf 1, eax
    const unsigned state = saved_state();
    const unsigned leaf7 = cpuid(7, 0).ebx;
    avx2 = has_bits(state, kSseAndAvxState) && has_bits(cpuid(1, 0).ecx, kAvxAndFma) && has_bits(leaf7, kAvx2);
    avx_vnni = avx2 && cpuid(7, 0).eax >= 1 && has_bits(cpuid(7, 1).eax, kAvxVnni);
    avx512 = avx2 && has_bits(state, kAvx512State) && has_bits(leaf7, kAvx512FDqBwVl);
    avx512_vnni = avx512 && has_bits(cpuid(7, 0).ecx, kAvx512VbmiVnni);
    avx512_bf16 = avx512 && cpuid(7, 0).eax >= 1 && has_bits(cpuid(7, 1).eax, kAvx512Bf16);
  }
};

}  // namespace

bool machine_has(Tier tier) {
  static const Features features;
  switch (tier) {
    case Tier::kScalar:
      return true;
    case Tier::kAvx2:
      return features.avx2;
    case Tier::kAvxVnni:
      return features.avx_vnni;
    case Tier::kAvx512:
      return features.avx512;
    case Tier::kAvx512Vnni:
      return features.avx512_vnni;
    case Tier::kAvx512Bf16:
      return features.avx512_bf16;
    case Tier::kNeon:
    case Tier::kNeonDot:
      return false;
  }
  return false;
}

#else

#ifdef SPARSE_ENGINE_NEON
namespace {

// Dot products of bytes (FEAT_DotProd), as the operating system tells: a program may not ask the processor.
bool has_dot_products() {
#ifdef __linux__
  constexpr unsigned long kAsimdDotProducts = 1ul << 20;  // of AT_HWCAP
  return (getauxval(AT_HWCAP) & kAsimdDotProducts) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

}  // namespace
#endif

bool machine_has(Tier tier) {
#ifdef SPARSE_ENGINE_NEON
  static const bool dot_products = has_dot_products();
  if (tier == Tier::kNeon) return true;  // 64-bit Arm has no processor without it
  if (tier == Tier::kNeonDot) return dot_products;
#endif
  return tier == Tier::kScalar;
}

#endif

}  // namespace sparse_engine
