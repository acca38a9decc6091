#include "ort_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>

#include "dispatch.h"
#include "ort_support.h"
#include "self_attention.h"

namespace sparse_engine::ort {
namespace {

constexpr const char* kName = "SelfAttention";

[[noreturn]] void fail(const std::string& message) {
  throw Error(sparse_engine::Status::kInvalidInput, message);
}

// KernelInfoGetAttribute_float, place 85 of the runtime's functions. Attributes have no "is it there": a failed
// read means that it is missing.
std::optional<float> float_attribute(const Api& api, const KernelInfo* info, const char* name) {
  using Function = Status* (*)(const KernelInfo*, const char*, float*);
  float value = 0.0f;
  Status* const status = reinterpret_cast<Function>(const_cast<void*>(api.table[85]))(info, name, &value);
  if (!status) return value;
  api.ReleaseStatus(status);
  return std::nullopt;
}

int heads_attribute(const Api& api, const KernelInfo* info) {
  const int64_t heads = int_attribute(api, info, "heads");
  if (heads < 1 || heads > std::numeric_limits<int>::max()) {
    fail("attribute heads = " + std::to_string(heads) + ", expected 1 or more");
  }
  return int(heads);
}

std::optional<float> scale_attribute(const Api& api, const KernelInfo* info) {
  const std::optional<float> scale = float_attribute(api, info, "scale");
  if (scale && !(*scale > 0.0f && std::isfinite(*scale))) {
    fail("attribute scale = " + std::to_string(*scale) + ", expected a finite number above 0");
  }
  return scale;
}

// One node of one session.
class Kernel {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        heads_(heads_attribute(api, info)),
        scale_(scale_attribute(api, info)),
        threads_(int(int_attribute(api, info, "threads", 0))),
        tier_(best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", "fp32")))) {
    if (threads_ < 1) threads_ = int(std::max(1u, std::thread::hardware_concurrency()));
  }

  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor qkv = input(api_, context, 0);
    Attention attention = dimensions(qkv.shape);
    attention.qkv = qkv.floats();
    attention.output = allocate_output(api_, context, {qkv.shape[0], qkv.shape[1], int64_t(attention.width())});
    run_attention(attention, tier_, threads_, parallel_for(api_, context));
  }

 private:
  Attention dimensions(const Shape& shape) const {
    const int64_t head_dim = shape.size() == 3 ? shape[2] / (3 * int64_t(heads_)) : 0;
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    if (head_dim < 1 || head_dim > kMost || head_dim * heads_ * 3 != shape[2]) {
      fail("qkv has shape " + to_string(shape) + ", expected [B, L, 3 D] with D a multiple of heads = " +
           std::to_string(heads_));
    }
    Attention attention;
    attention.batch = size_t(shape[0]);
    attention.tokens = size_t(shape[1]);
    attention.heads = heads_;
    attention.head_dim = int(head_dim);
    attention.scale = scale_.value_or(1.0f / std::sqrt(float(head_dim)));
    return attention;
  }

  const Api api_;
  int heads_;
  std::optional<float> scale_;
  int threads_;
  Tier tier_;
};

Status* create(const CustomOp*, FunctionTable table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  return guarded(api, kName, [&] { *kernel = new Kernel(api, info); });
}

Status* compute(void* kernel, KernelContext* context) {
  const Kernel& self = *static_cast<Kernel*>(kernel);
  return guarded(self.api(), kName, [&] { self.compute(context); });
}

// The output has the shape of qkv with a third of its last dimension; dimensions that have names keep them.
void infer(const Api& api, ShapeInferContext* context) {
  TensorTypeAndShapeInfo* qkv = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape(context, 0, &qkv));
  size_t count = 0;
  check(api, api.GetDimensionsCount(qkv, &count));
  if (count == 0) return;  // rank unknown: nothing to say until run time
  Shape shape(count);
  std::vector<const char*> names(count);
  check(api, api.GetDimensions(qkv, shape.data(), count));
  check(api, api.GetSymbolicDimensions(qkv, names.data(), count));
  if (shape.back() > 0) shape.back() /= 3;
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
  const Api& api = static_cast<const SelfAttentionOp*>(op)->api;
  return guarded(api, kName, [&] { infer(api, context); });
}

}  // namespace

SelfAttentionOp::SelfAttentionOp(FunctionTable table) : CustomOp(common_callbacks()), api(table) {
  GetName = [](const CustomOp*) { return kName; };
  GetInputTypeCount = [](const CustomOp*) { return size_t(1); };
  GetInputType = [](const CustomOp*, size_t) { return kFloat; };
  GetInputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  CreateKernelV2 = create;
  KernelComputeV2 = compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  InferOutputShapeFn = infer_shape;
}

}  // namespace sparse_engine::ort
