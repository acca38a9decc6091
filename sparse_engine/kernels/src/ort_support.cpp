#include "ort_support.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>

namespace sparse_engine::ort {
namespace {

Shape shape_of(const Api& api, const TensorTypeAndShapeInfo* info) {
  size_t count = 0;
  check(api, api.GetDimensionsCount(info, &count));
  Shape shape(count);
  check(api, api.GetDimensions(info, shape.data(), count));
  return shape;
}

// Attributes have no "is it there": a failed read means that it is missing.
bool succeeded(const Api& api, Status* status) {
  if (!status) return true;
  api.ReleaseStatus(status);
  return false;
}

}  // namespace

ElementType type_of(Element element) {
  return element == Element::kFloat32 ? kFloat : element == Element::kBfloat16 ? kBfloat16 : kUint8;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void fail(const std::string& message) { throw Error(sparse_engine::Status::kInvalidInput, message); }

void expect_shape(const char* name, const Shape& shape, const Shape& expected) {
  if (shape == expected) return;
  fail(std::string(name) + " has shape " + to_string(shape) + ", expected " + to_string(expected));
}

void check(const Api& api, Status* status) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(sparse_engine::Status::kFailed, message);
}

Tensor view(const Api& api, const Value* value) {
  TensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<TensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> owner(
      info, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor;
  tensor.shape = shape_of(api, info);
  check(api, api.GetTensorMutableData(const_cast<Value*>(value), &tensor.data));
  return tensor;
}

Tensor constant_input(const Api& api, const KernelInfo* info, size_t index, const char* name) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api, api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (is_constant && value) return view(api, value);
  fail(std::string("input '") + name + "' must be an initializer: it is packed when the session is created");
}

Tensor input(const Api& api, const KernelContext* context, size_t index) {
  const Value* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  return view(api, value);
}

std::optional<Tensor> optional_input(const Api& api, const KernelContext* context, size_t index) {
  size_t count = 0;
  check(api, api.KernelContext_GetInputCount(context, &count));
  if (index >= count) return std::nullopt;
  const Value* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  if (!value) return std::nullopt;
  return view(api, value);
}

void* allocate_output(const Api& api, KernelContext* context, const Shape& shape, Element element) {
  Value* value = nullptr;
  void* data = nullptr;
  check(api, api.KernelContext_GetOutput(context, size_t(element), shape.data(), shape.size(), &value));
  if (!value) fail("the node lacks the output that its attribute \"output\" asks for");
  check(api, api.GetTensorMutableData(value, &data));
  return data;
}

float* allocate_output(const Api& api, KernelContext* context, const Shape& shape) {
  return static_cast<float*>(allocate_output(api, context, shape, Element::kFloat32));
}

Element element_attribute(const Api& api, const KernelInfo* info) {
  const int64_t output = int_attribute(api, info, "output", 0);
  if (output < 0 || output > 2) fail("attribute output = " + std::to_string(output) + ", expected 0, 1 or 2");
  return Element(output);
}

Codes codes_attribute(const Api& api, const KernelInfo* info, const std::string& of) {
  const std::string scale = of + "_scale", zero = of + "_zero";
  return {float_attribute(api, info, scale.c_str()).value_or(1.0f), int(int_attribute(api, info, zero.c_str(), 0))};
}

int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api, api.KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name, int64_t missing) {
  int64_t value = 0;
  return succeeded(api, api.KernelInfoGetAttribute_int64(info, name, &value)) ? value : missing;
}

std::optional<float> float_attribute(const Api& api, const KernelInfo* info, const char* name) {
  float value = 0.0f;
  if (!succeeded(api, api.KernelInfoGetAttribute_float(info, name, &value))) return std::nullopt;
  return value;
}

std::string string_attribute(const Api& api, const KernelInfo* info, const char* name, const char* missing) {
  size_t size = 0;  // asking without a buffer returns the size, with the terminating zero
  if (!succeeded(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size))) return missing;
  std::string value(size, '\0');
  check(api, api.KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size - 1);
  return value;
}

int threads_attribute(const Api& api, const KernelInfo* info) {
  const int64_t threads = int_attribute(api, info, "threads", 0);
  return int(threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency()));
}

int64_t int_attribute(const Api& api, const ShapeInferContext* context, const char* name) {
  const OpAttr* attribute = nullptr;
  check(api, api.ShapeInferContext_GetAttribute(context, name, &attribute));
  int64_t value = 0;
  size_t size = 0;
  check(api, api.ReadOpAttr(attribute, kAttrInt, &value, sizeof value, &size));
  return value;
}

void infer_last_dimension(const Api& api, ShapeInferContext* context, const std::function<int64_t(int64_t)>& last) {
  infer_from_first(api, context, [&](Shape& shape, std::vector<const char*>& names) {
    shape.back() = last(shape.back());
    names.back() = "";
  });
}

void infer_from_first(const Api& api, ShapeInferContext* context,
                      const std::function<void(Shape&, std::vector<const char*>&)>& rewrite) {
  infer_shape_from(api, context, 0, Element::kFloat32, rewrite);
}

Element inferred_element(const Api& api, const ShapeInferContext* context) {
  const OpAttr* attribute = nullptr;
  const bool given = succeeded(api, api.ShapeInferContext_GetAttribute(context, "output", &attribute)) && attribute;
  return given ? Element(int_attribute(api, context, "output")) : Element::kFloat32;
}

void infer_shape_from(const Api& api, ShapeInferContext* context, size_t input, Element element,
                      const std::function<void(Shape&, std::vector<const char*>&)>& rewrite) {
  TensorTypeAndShapeInfo* x = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape(context, input, &x));
  Shape shape = shape_of(api, x);
  if (shape.empty()) return;
  std::vector<const char*> names(shape.size());
  check(api, api.GetSymbolicDimensions(x, names.data(), names.size()));
  rewrite(shape, names);

  TensorTypeAndShapeInfo* y = nullptr;
  check(api, api.CreateTensorTypeAndShapeInfo(&y));
  const std::unique_ptr<TensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> owner(
      y, api.ReleaseTensorTypeAndShapeInfo);
  check(api, api.SetTensorElementType(y, type_of(element)));
  check(api, api.SetDimensions(y, shape.data(), shape.size()));
  check(api, api.SetSymbolicDimensions(y, names.data(), names.size()));
  check(api, api.ShapeInferContext_SetOutputTypeShape(context, size_t(element), y));
}

void infer_shape_from_either(const Api& api, ShapeInferContext* context, size_t first, size_t second,
                             const std::function<void(Shape&, std::vector<const char*>&)>& rewrite) {
  TensorTypeAndShapeInfo* x = nullptr;
  const bool there = succeeded(api, api.ShapeInferContext_GetInputTypeShape(context, first, &x)) && x;
  const size_t input = there && !shape_of(api, x).empty() ? first : second;
  infer_shape_from(api, context, input, inferred_element(api, context), rewrite);
}

ParallelFor parallel_for(const Api& api, const KernelContext* context) {
  return [&api, context](int workers, const std::function<void()>& work) {
    struct Shared {
      const std::function<void()>& work;
      std::exception_ptr failure;
      std::mutex mutex;
    } shared{work, nullptr, {}};
    // An exception must not cross the runtime's thread pool: the first one waits here until all are done.
    const auto run_one = [](void* argument, size_t) {
      Shared& shared = *static_cast<Shared*>(argument);
      try {
        shared.work();
      } catch (...) {
        const std::lock_guard<std::mutex> lock(shared.mutex);
        if (!shared.failure) shared.failure = std::current_exception();
      }
    };
    check(api, api.KernelContext_ParallelFor(context, run_one, size_t(workers), 0, &shared));
    if (shared.failure) std::rethrow_exception(shared.failure);
  };
}

Operator::Operator(FunctionTable table) : CustomOp{}, api(table) {
  version = kApiVersion;
  GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  GetOutputTypeCount = [](const CustomOp*) { return size_t(1); };
  GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
  GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  const auto one = [](const CustomOp*) { return 1; };
  GetVariadicInputMinArity = one;
  GetVariadicInputHomogeneity = one;
  GetVariadicOutputMinArity = one;
  GetVariadicOutputHomogeneity = one;
  GetStartVersion = one;
  GetEndVersion = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
}

}  // namespace sparse_engine::ort
