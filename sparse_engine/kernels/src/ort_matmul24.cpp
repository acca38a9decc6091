#include "ort_matmul24.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <thread>

#include "dispatch.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

constexpr const char* kName = "MatMul24";
enum Input : size_t { kX = 0, kValues = 1, kPositions = 2, kBias = 3, kResidual = 4, kInputCount = 5 };

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

Weights24 canonical_weights(const Api& api, const KernelInfo* info) {
  const int64_t rows = int_attribute(api, info, "N");
  const int64_t depth = int_attribute(api, info, "K");
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (rows < 1 || depth < 4 || depth % 4 != 0 || rows > kMost || depth > kMost) {
    fail("attributes N = " + std::to_string(rows) + ", K = " + std::to_string(depth) +
         ", expected N >= 1 and K a positive multiple of 4");
  }
  const Tensor values = constant_input(api, info, kValues, "values");
  const Tensor positions = constant_input(api, info, kPositions, "positions");
  expect_shape("values", values.shape, {rows, depth / 2});
  expect_shape("positions", positions.shape, {rows, depth / 4});
  return {int(rows), int(depth), values.floats(), static_cast<const uint8_t*>(positions.data)};
}

// One node of one session.
class Kernel {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(int(int_attribute(api, info, "threads", 0))),
        product_(canonical_weights(api, info),
                 best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", "fp32"))),
                 parse_lanes(string_attribute(api, info, "tactic", "auto"))) {
    if (threads_ < 1) threads_ = int(std::max(1u, std::thread::hardware_concurrency()));
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, kX);
    expect_depth(x.shape, product_.depth());
    Shape shape = x.shape;
    shape.back() = product_.rows();
    size_t tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= size_t(shape[i]);

    Epilogue epilogue;
    epilogue.activation = activation_;
    if (const auto bias = optional_input(api_, context, kBias)) {
      expect_shape("bias", bias->shape, {product_.rows()});
      epilogue.bias = bias->floats();
    }
    if (const auto residual = optional_input(api_, context, kResidual)) {
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

Status* create(const CustomOp*, FunctionTable table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  return guarded(api, kName, [&] { *kernel = new Kernel(api, info); });
}

Status* compute(void* kernel, KernelContext* context) {
  const Kernel& self = *static_cast<Kernel*>(kernel);
  return guarded(self.api(), kName, [&] { self.compute(context); });
}

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
  check(api, api.ShapeInferContext_GetInputTypeShape(context, kX, &x));
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

Status* infer_shape(const CustomOp* op, ShapeInferContext* context) {
  const Api& api = static_cast<const MatMul24Op*>(op)->api;
  return guarded(api, kName, [&] { infer(api, context); });
}

}  // namespace

MatMul24Op::MatMul24Op(FunctionTable table) : CustomOp(common_callbacks()), api(table) {
  GetName = [](const CustomOp*) { return kName; };
  GetInputTypeCount = [](const CustomOp*) { return size_t(kInputCount); };
  GetInputType = [](const CustomOp*, size_t index) { return index == kPositions ? kUint8 : kFloat; };
  GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index >= kBias ? kOptional : kRequired;
  };
  CreateKernelV2 = create;
  KernelComputeV2 = compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  InferOutputShapeFn = infer_shape;
}

}  // namespace sparse_engine::ort
