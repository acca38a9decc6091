#include "ort_support.h"

#include <limits>
#include <memory>

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

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
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
  throw Error(
      sparse_engine::Status::kInvalidInput,
      std::string("input '") + name + "' must be an initializer: it is packed when the session is created");
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

float* allocate_output(const Api& api, KernelContext* context, const Shape& shape) {
  Value* value = nullptr;
  void* data = nullptr;
  check(api, api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
  check(api, api.GetTensorMutableData(value, &data));
  return static_cast<float*>(data);
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

std::string string_attribute(const Api& api, const KernelInfo* info, const char* name, const char* missing) {
  size_t size = 0;  // asking without a buffer returns the size, with the terminating zero
  if (!succeeded(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size))) return missing;
  std::string value(size, '\0');
  check(api, api.KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size - 1);
  return value;
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

CustomOp common_callbacks() {
  CustomOp op{};
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t(1); };
  op.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  const auto one = [](const CustomOp*) { return 1; };
  op.GetVariadicInputMinArity = one;
  op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = one;
  op.GetVariadicOutputHomogeneity = one;
  op.GetStartVersion = one;
  op.GetEndVersion = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
  return op;
}

}  // namespace sparse_engine::ort
