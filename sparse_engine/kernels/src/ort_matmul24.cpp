#include "ort_matmul24.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>

#include "dispatch.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The two operators differ in how their weights are given.
struct Sparse {
  static constexpr const char* kName = "MatMul24";
  static constexpr const char* kDefaultCompute = "fp32";
  enum Input : size_t { kX = 0, kValues = 1, kPositions = 2, kBias = 3, kResidual = 4, kInputCount = 5 };
};
struct Dense {
  static constexpr const char* kName = "MatMulBf16";
  static constexpr const char* kDefaultCompute = "bf16";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 2, kResidual = 3, kInputCount = 4 };
};

[[noreturn]] void fail(const std::string& message) {
  throw Error(sparse_engine::Status::kInvalidInput, message);
}

void expect_shape(const char* name, const Shape& shape, const Shape& expected) {
  if (shape != expected) {
    fail(std::string(name) + " has shape " + to_string(shape) + ", expected " + to_string(expected));
  }
}

void expect_depth(const Shape& shape, int64_t depth) {
  if (!shape.empty() && (shape.back() == depth || shape.back() < 0)) return;
  fail("X has shape " + to_string(shape) + ", expected [..., K] with K = " + std::to_string(depth));
}

template <class Form>
Weights24 weights(const Api& api, const KernelInfo* info) {
  const int64_t rows = int_attribute(api, info, "N");
  const int64_t depth = int_attribute(api, info, "K");
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (rows < 1 || depth < 4 || depth % 4 != 0 || rows > kMost || depth > kMost) {
    fail("attributes N = " + std::to_string(rows) + ", K = " + std::to_string(depth) +
         ", expected N >= 1 and K a positive multiple of 4");
  }
  if constexpr (std::is_same_v<Form, Dense>) {
    const Tensor values = constant_input(api, info, Form::kValues, "weight");
    expect_shape("weight", values.shape, {rows, depth});
    return {int(rows), int(depth), values.floats(), nullptr};
  } else {
    const Tensor values = constant_input(api, info, Form::kValues, "values");
    const Tensor positions = constant_input(api, info, Form::kPositions, "positions");
    expect_shape("values", values.shape, {rows, depth / 2});
    expect_shape("positions", positions.shape, {rows, depth / 4});
    return {int(rows), int(depth), values.floats(), static_cast<const uint8_t*>(positions.data)};
  }
}

// One node of one session.
template <class Form>
class Kernel {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(int(int_attribute(api, info, "threads", 0))),
        product_(weights<Form>(api, info),
                 best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", Form::kDefaultCompute))),
                 parse_lanes(string_attribute(api, info, "tactic", "auto"))) {
    if (threads_ < 1) threads_ = int(std::max(1u, std::thread::hardware_concurrency()));
    product_.page_out_weights();
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, Form::kX);
    expect_depth(x.shape, product_.depth());
    Shape shape = x.shape;
    shape.back() = product_.rows();
    size_t tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= size_t(shape[i]);

    Epilogue epilogue;
    epilogue.activation = activation_;
    if (const auto bias = optional_input(api_, context, Form::kBias)) {
      expect_shape("bias", bias->shape, {product_.rows()});
      epilogue.bias = bias->floats();
    }
    if (const auto residual = optional_input(api_, context, Form::kResidual)) {
      expect_shape("residual", residual->shape, shape);
      epilogue.residual = residual->floats();
    }
    float* const y = allocate_output(api_, context, shape);
    product_.run(x.floats(), tokens, y, epilogue, threads_, parallel_for(api_, context));
  }

 private:
  const Api api_;
  Activation activation_;
  int threads_;
  MatMul24 product_;
};

int64_t rows_attribute(const Api& api, const ShapeInferContext* context) {
  const OpAttr* attribute = nullptr;
  check(api, api.ShapeInferContext_GetAttribute(context, "N", &attribute));
  int64_t rows = 0;
  size_t size = 0;
  check(api, api.ReadOpAttr(attribute, kAttrInt, &rows, sizeof rows, &size));
  return rows;
}

// The output has the shape of X with N for K; dimensions that have names keep them.
void infer(const Api& api, ShapeInferContext* context) {
  TensorTypeAndShapeInfo* x = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
  size_t count = 0;
  check(api, api.GetDimensionsCount(x, &count));
  if (count == 0) return;  // rank unknown: nothing to say until run time
  Shape shape(count);
  std::vector<const char*> names(count);
  check(api, api.GetDimensions(x, shape.data(), count));
  check(api, api.GetSymbolicDimensions(x, names.data(), count));
  shape.back() = rows_attribute(api, context);
  names.back() = "";

  TensorTypeAndShapeInfo* y = nullptr;
  check(api, api.CreateTensorTypeAndShapeInfo(&y));
  const std::unique_ptr<TensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> owner(
      y, api.ReleaseTensorTypeAndShapeInfo);
  check(api, api.SetTensorElementType(y, kFloat));
  check(api, api.SetDimensions(y, shape.data(), count));
  check(api, api.SetSymbolicDimensions(y, names.data(), count));
  check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, y));
}

template <class Form>
void define(CustomOp& op) {
  op.GetName = [](const CustomOp*) { return Form::kName; };
  op.GetInputTypeCount = [](const CustomOp*) { return size_t(Form::kInputCount); };
  op.GetInputType = [](const CustomOp*, size_t index) {
    if constexpr (std::is_same_v<Form, Sparse>) {
      if (index == Form::kPositions) return kUint8;
    }
    return kFloat;
  };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index >= Form::kBias ? kOptional : kRequired;
  };
  op.CreateKernelV2 = [](const CustomOp*, FunctionTable table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, Form::kName, [&] { *kernel = new Kernel<Form>(api, info); });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const Kernel<Form>& self = *static_cast<Kernel<Form>*>(kernel);
    return guarded(self.api(), Form::kName, [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Form>*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    const Api& api = static_cast<const MatMulOp*>(op)->api;
    return guarded(api, Form::kName, [&] { infer(api, context); });
  };
}

}  // namespace

MatMulOp::MatMulOp(FunctionTable table, Weights weights) : CustomOp(common_callbacks()), api(table) {
  weights == Weights::k24 ? define<Sparse>(*this) : define<Dense>(*this);
}

}  // namespace sparse_engine::ort
