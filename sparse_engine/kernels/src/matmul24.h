// The words that every file of this folder shares.
//
// A product is Y[tokens, rows] = epilogue(X[tokens, depth] * W[rows, depth]^T), where in each group of four
// consecutive weights of a row at most two are not zero. (In GEMM letters: tokens M, rows N, depth K.)
#pragma once

#include <cstddef>
#include <cstdint>

// Kernels are built from small functions that must not become calls.
#define SPARSE_ENGINE_INLINE inline __attribute__((always_inline))

namespace sparse_engine {

enum class Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

// An instruction set with its kernels. bf16 products are a tier of their own, and so are those in 8 bits (int8.h): they
// round the operands.
enum class Tier : int {
  kScalar = 0,
  kAvx2 = 1,
  kAvxVnni = 2,
  kAvx512 = 3,
  kAvx512Vnni = 4,
  kAvx512Bf16 = 5,
  kNeon = 6,
  kNeonDot = 7
};
constexpr int kTierCount = 8;

// What lies in the lanes of a vector: tokens, or output rows (kRegisters: of a convolution, each picking its x out of a
// whole register of them). They add an element's products up in different orders,
// so a layer has one of them, whatever the number of tokens: its results do not depend on what else is in a call.
enum class Lanes : int { kTokens = 0, kRows = 1, kRegisters = 2 };

// Canonical 2:4 weights, as an engine file stores them; or dense ones, which have no positions.
struct Weights24 {
  int rows = 0;
  int depth = 0;                       // a multiple of 4
  const float* values = nullptr;       // [rows, depth / 2], two kept values per group; dense: [rows, depth]
  const uint8_t* positions = nullptr;  // [rows, depth / 4], first | second << 2, first < second

  SPARSE_ENGINE_INLINE bool dense() const { return positions == nullptr; }

  SPARSE_ENGINE_INLINE int groups() const { return depth / 4; }
};

// What happens to a sum before it is stored: activation(sum + bias) + residual.
struct Epilogue {
  const float* bias = nullptr;      // [rows], or null
  const float* residual = nullptr;  // [tokens, rows], or null; may be the output itself
  Activation activation = Activation::kNone;
};

struct Product {
  int rows = 0;
  int depth = 0;
  const void* packed = nullptr;  // written by the same tactic's pack()
  const float* input = nullptr;  // [tokens, depth]
  float* output = nullptr;       // [tokens, rows]
  Epilogue epilogue;
};

// The part of a product that one thread computes at a time.
struct Block {
  size_t token_begin = 0, token_end = 0;
  int row_begin = 0, row_end = 0;  // row_begin is a multiple of the tactic's row_multiple
};

// One way to compute a product: an instruction set and a layout. Plain function pointers and no virtual
// classes or standard containers, because these functions are compiled with instructions that the machine
// may lack: an inline function of the standard library compiled here could be the copy that the linker
// keeps for everybody.
struct Tactic {
  Tier tier;
  Lanes lanes;
  int lane_count;    // tokens are split between threads at multiples of this
  int tile_tokens;   // the most tokens that are worth one block
  int row_multiple;  // rows are split between threads at multiples of this
  size_t (*packed_bytes)(int rows, int depth);
  void (*pack)(const Weights24& weights, void* packed);  // packed: 64-byte aligned
  size_t (*scratch_bytes)(int depth, int block_rows);
  void (*run)(const Product& product, const Block& block, void* scratch);  // scratch: 64-byte aligned
  // second(first(input)), the output of the first never leaving scratch; null where a tactic cannot.
  size_t (*pair_scratch_bytes)(const Product& first, const Product& second) = nullptr;
  void (*run_pair)(const Product& first, const Product& second, size_t token_begin, size_t token_end,
                   void* scratch) = nullptr;
};

// How the work of a product or a convolution is split: see Tactic, whose numbers these are.
struct Grain {
  int lane_count, tile_tokens, row_multiple;
  double stream_cost;  // of walking the weights of all rows once, in units of one `lane_count` of tokens
};

constexpr double kStreamCost = 0.4;  // of T-lanes, whatever the width of the tile: fitted to timings on a Zen 4

// Multiply-adds that depend on nothing, to measure the machine with.
struct PeakLoop {
  double flops_per_iteration;
  void (*run)(size_t iterations, bool load);  // load: each operand comes from L1 rather than a register
};

// Defined by one file each. kRows of the scalar tier does not exist: it has no lanes.
extern const Tactic kScalarTactic;
#ifdef SPARSE_ENGINE_X86
extern const Tactic kAvx2Tokens, kAvx2Rows;
extern const Tactic kAvx512Tokens, kAvx512Rows;
extern const Tactic kAvx512Bf16Tokens, kAvx512Bf16Rows, kAvx512Bf16Dense;
extern const PeakLoop kAvx2Peak, kAvx512Peak, kAvx512Bf16Peak;
#endif
#ifdef SPARSE_ENGINE_NEON
extern const Tactic kNeonTokens, kNeonRows;
extern const PeakLoop kNeonPeak;
#endif

}  // namespace sparse_engine
