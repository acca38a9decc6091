#include "ort_matmul24.h"

#include <limits>

#include "dispatch.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The two operators differ in how their weights are given.
struct Sparse {
  static constexpr const char* kName = "MatMul24";
  static constexpr bool kIsSparse = true;
  static constexpr const char* kDefaultCompute = "fp32";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 3, kResidual = 4, kInputCount = 5 };
};
struct Dense {
  static constexpr const char* kName = "MatMulBf16";
  static constexpr bool kIsSparse = false;
  static constexpr const char* kDefaultCompute = "bf16";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 2, kResidual = 3, kInputCount = 4 };
};

// One node of one session.
template <class Form>
class Kernel : public Form {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(threads_attribute(api, info)),
        product_(weights_input(api, info, int_attribute(api, info, "N"), int_attribute(api, info, "K"), Form::kValues,
                               Form::kIsSparse),
                 best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", Form::kDefaultCompute))),
                 parse_lanes(string_attribute(api, info, "tactic", "t-lanes"))) {
    product_.page_out_weights();
  }

  static ElementType input_type(size_t index) {
    return Form::kIsSparse && index == Form::kValues + 1 ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index >= Form::kBias; }
  static void infer_shape(const Api& api, ShapeInferContext* context) { infer_rows(api, context); }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, Form::kX);
    const size_t tokens = tokens_of(x.shape, product_.depth());
    Shape shape = x.shape;
    shape.back() = product_.rows();
    Epilogue epilogue;
    epilogue.activation = activation_;
    epilogue.bias = bias_input(api_, context, Form::kBias, "bias", product_.rows());
    epilogue.residual = residual_input(api_, context, Form::kResidual, shape);
    float* const y = allocate_output(api_, context, shape);
    product_.run(x.floats(), tokens, y, epilogue, threads_, parallel_for(api_, context));
  }

 private:
  const Api api_;
  Activation activation_;
  int threads_;
  MatMul24 product_;
};

}  // namespace

Weights24 weights_input(const Api& api, const KernelInfo* info, int64_t rows, int64_t depth, size_t index,
                        bool is_sparse) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (rows < 1 || depth < 4 || depth % 4 != 0 || rows > kMost || depth > kMost) {
    fail("attributes N = " + std::to_string(rows) + ", K = " + std::to_string(depth) +
         ", expected N >= 1 and K a positive multiple of 4");
  }
  const char* const name = is_sparse ? "values" : "weight";
  const Tensor values = constant_input(api, info, index, name);
  expect_shape(name, values.shape, {rows, is_sparse ? depth / 2 : depth});
  if (!is_sparse) return {int(rows), int(depth), values.floats(), nullptr};
  const Tensor positions = constant_input(api, info, index + 1, "positions");
  expect_shape("positions", positions.shape, {rows, depth / 4});
  return {int(rows), int(depth), values.floats(), static_cast<const uint8_t*>(positions.data)};
}

size_t tokens_of(const Shape& shape, int depth) {
  if (shape.empty() || shape.back() != depth) {
    fail("X has shape " + to_string(shape) + ", expected [..., K] with K = " + std::to_string(depth));
  }
  size_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= size_t(shape[i]);
  return tokens;
}

const float* bias_input(const Api& api, KernelContext* context, size_t index, const char* name, int rows) {
  const auto bias = optional_input(api, context, index);
  if (!bias) return nullptr;
  expect_shape(name, bias->shape, {rows});
  return bias->floats();
}

const float* residual_input(const Api& api, KernelContext* context, size_t index, const Shape& shape) {
  const auto residual = optional_input(api, context, index);
  if (!residual) return nullptr;
  expect_shape("residual", residual->shape, shape);
  return residual->floats();
}

void infer_rows(const Api& api, ShapeInferContext* context) {
  infer_last_dimension(api, context, [&](int64_t) { return int_attribute(api, context, "N"); });
}

Operator matmul24(FunctionTable table) { return operator_of<Kernel<Sparse>>(table); }
Operator matmul_bf16(FunctionTable table) { return operator_of<Kernel<Dense>>(table); }

}  // namespace sparse_engine::ort
