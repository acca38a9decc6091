// ONNX Runtime's C interface in C++ terms: a failed call is an exception, a tensor knows its shape.
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "error.h"
#include "int8.h"
#include "ort_abi.h"
#include "product24.h"

namespace sparse_engine::ort {

using Shape = std::vector<int64_t>;  // -1 where a dimension is not known yet

std::string to_string(const Shape& shape);

// Throws Error for something that a graph has wrong.
[[noreturn]] void fail(const std::string& message);
void expect_shape(const char* name, const Shape& shape, const Shape& expected);

// Throws Error with the runtime's message if `status` is one.
void check(const Api& api, Status* status);

// Runs `body` at a boundary to the runtime: an exception becomes a status.
template <class Body>
Status* guarded(const Api& api, const std::string& op, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    const bool invalid = error.status == sparse_engine::Status::kInvalidInput;
    const bool unsupported = error.status == sparse_engine::Status::kUnsupported;
    return api.CreateStatus(invalid       ? kInvalidArgument
                            : unsupported ? kNotImplemented
                                          : kFail,
                            (op + ": " + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(kFail, (op + ": " + error.what()).c_str());
  }
}

struct Tensor {
  void* data = nullptr;
  Shape shape;

  const float* floats() const { return static_cast<const float*>(data); }
};

Tensor view(const Api& api, const Value* value);
Tensor constant_input(const Api& api, const KernelInfo* info, size_t index, const char* name);
Tensor input(const Api& api, const KernelContext* context, size_t index);
std::optional<Tensor> optional_input(const Api& api, const KernelContext* context, size_t index);
float* allocate_output(const Api& api, KernelContext* context, const Shape& shape);

// Operators that give floats, bfloat16 or codes have an output for each, of which a node has one: the attribute
// "output" says which (0, the default, 1 or 2), and the codes' scale and zero point are y_scale and y_zero.
ElementType type_of(Element element);
void* allocate_output(const Api& api, KernelContext* context, const Shape& shape, Element element);
Element element_attribute(const Api& api, const KernelInfo* info);
Codes codes_attribute(const Api& api, const KernelInfo* info, const std::string& of);  // of: x, y, ...

int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name);
int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name, int64_t missing);
std::optional<float> float_attribute(const Api& api, const KernelInfo* info, const char* name);
std::string string_attribute(const Api& api, const KernelInfo* info, const char* name, const char* missing);

// The attribute "threads" of every operator here: how many of the session's threads to use at most; 0, or none: the
// machine's.
int threads_attribute(const Api& api, const KernelInfo* info);

// Shape inference: the output has the shape of the first input but for what rewrite() changes, or but for the last
// dimension, which becomes last(size). Dimensions that have names keep them; where the rank is unknown there is nothing
// to say.
void infer_from_first(const Api& api, ShapeInferContext* context,
                      const std::function<void(Shape&, std::vector<const char*>& names)>& rewrite);
void infer_last_dimension(const Api& api, ShapeInferContext* context, const std::function<int64_t(int64_t)>& last);
int64_t int_attribute(const Api& api, const ShapeInferContext* context, const char* name);
Element inferred_element(const Api& api, const ShapeInferContext* context);  // as element_attribute
void infer_shape_from(const Api& api, ShapeInferContext* context, size_t input, Element element,
                      const std::function<void(Shape&, std::vector<const char*>& names)>& rewrite);
// From the first of two optional inputs that is there, to the output that the attribute "output" says.
void infer_shape_from_either(const Api& api, ShapeInferContext* context, size_t first, size_t second,
                             const std::function<void(Shape&, std::vector<const char*>& names)>& rewrite);

// A loop over the session's own threads.
ParallelFor parallel_for(const Api& api, const KernelContext* context);

// An operator of this library: CPU, one float output unless said, not variadic. The runtime's functions travel with it,
// because shape inference is given nothing else.
struct Operator : CustomOp {
  explicit Operator(FunctionTable table);
  Api api;
};

// The operator whose nodes are of a class with
//   Kernel(api, info), which throws Error for a node that is wrong; compute(context); api()
//   static kName, kInputCount, input_type(index), is_optional(index), infer_shape(api, context)
template <class Kernel>
Operator operator_of(FunctionTable table);

// The same, with one output for each Element that `Kernel` may give.
template <class Kernel>
Operator operator_of_elements(FunctionTable table) {
  Operator op = operator_of<Kernel>(table);
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t(3); };
  op.GetOutputType = [](const CustomOp*, size_t index) { return type_of(Element(index)); };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kOptional; };
  return op;
}

template <class Kernel>
Operator operator_of(FunctionTable table) {
  Operator op(table);
  op.GetName = [](const CustomOp*) { return Kernel::kName; };
  op.GetInputTypeCount = [](const CustomOp*) { return size_t(Kernel::kInputCount); };
  op.GetInputType = [](const CustomOp*, size_t index) { return Kernel::input_type(index); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return Kernel::is_optional(index) ? kOptional : kRequired;
  };
  op.CreateKernelV2 = [](const CustomOp*, FunctionTable table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, Kernel::kName, [&] { *kernel = new Kernel(api, info); });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const Kernel& self = *static_cast<Kernel*>(kernel);
    return guarded(self.api(), Kernel::kName, [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    const Api& api = static_cast<const Operator*>(op)->api;
    return guarded(api, Kernel::kName, [&] { Kernel::infer_shape(api, context); });
  };
  return op;
}

}  // namespace sparse_engine::ort
