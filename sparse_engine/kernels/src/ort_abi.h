// The part of ONNX Runtime's C interface that a custom operator needs, declared here.
//
// ONNX Runtime publishes no package with its C headers that a build could depend on, and the interface is
// stable and append-only: OrtApi is a table of functions whose places never change, OrtCustomOp a structure
// that only grows at its end. Places were checked against the headers of versions 16 to 29 of the interface;
// version 17 (ONNX Runtime 1.17) is the oldest with shape inference and KernelContext_ParallelFor.
// Names are ONNX Runtime's own, without the prefix Ort.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_engine::ort {

constexpr uint32_t kApiVersion = 17;

struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct OpAttr;
struct SessionOptions;
struct ShapeInferContext;
struct Status;
struct TensorTypeAndShapeInfo;
struct Value;

using FunctionTable = const void* const*;

struct ApiBase {
  FunctionTable (*GetApi)(uint32_t version);  // null where the runtime is older
  const char* (*GetVersionString)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kBfloat16 = 16 };
enum OpAttrType : int { kAttrInt = 1 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

#define SPARSE_ENGINE_ORT_FUNCTION(place, result, name, ...) \
  using name##Function = result (*)(__VA_ARGS__);            \
  name##Function name = reinterpret_cast<name##Function>(const_cast<void*>(table[place]));

struct Api {
  explicit Api(FunctionTable functions) : table(functions) {}
  FunctionTable table;

  SPARSE_ENGINE_ORT_FUNCTION(0, Status*, CreateStatus, ErrorCode, const char*)
  SPARSE_ENGINE_ORT_FUNCTION(2, const char*, GetErrorMessage, const Status*)
  SPARSE_ENGINE_ORT_FUNCTION(26, Status*, CreateCustomOpDomain, const char*, CustomOpDomain**)
  SPARSE_ENGINE_ORT_FUNCTION(27, Status*, CustomOpDomain_Add, CustomOpDomain*, const struct CustomOp*)
  SPARSE_ENGINE_ORT_FUNCTION(28, Status*, AddCustomOpDomain, SessionOptions*, CustomOpDomain*)
  SPARSE_ENGINE_ORT_FUNCTION(51, Status*, GetTensorMutableData, Value*, void**)
  SPARSE_ENGINE_ORT_FUNCTION(57, Status*, CreateTensorTypeAndShapeInfo, TensorTypeAndShapeInfo**)
  SPARSE_ENGINE_ORT_FUNCTION(58, Status*, SetTensorElementType, TensorTypeAndShapeInfo*, ElementType)
  SPARSE_ENGINE_ORT_FUNCTION(59, Status*, SetDimensions, TensorTypeAndShapeInfo*, const int64_t*, size_t)
  SPARSE_ENGINE_ORT_FUNCTION(61, Status*, GetDimensionsCount, const TensorTypeAndShapeInfo*, size_t*)
  SPARSE_ENGINE_ORT_FUNCTION(62, Status*, GetDimensions, const TensorTypeAndShapeInfo*, int64_t*, size_t)
  SPARSE_ENGINE_ORT_FUNCTION(63, Status*, GetSymbolicDimensions, const TensorTypeAndShapeInfo*, const char**, size_t)
  SPARSE_ENGINE_ORT_FUNCTION(65, Status*, GetTensorTypeAndShape, const Value*, TensorTypeAndShapeInfo**)
  SPARSE_ENGINE_ORT_FUNCTION(85, Status*, KernelInfoGetAttribute_float, const KernelInfo*, const char*, float*)
  SPARSE_ENGINE_ORT_FUNCTION(86, Status*, KernelInfoGetAttribute_int64, const KernelInfo*, const char*, int64_t*)
  SPARSE_ENGINE_ORT_FUNCTION(87, Status*, KernelInfoGetAttribute_string, const KernelInfo*, const char*, char*, size_t*)
  SPARSE_ENGINE_ORT_FUNCTION(88, Status*, KernelContext_GetInputCount, const KernelContext*, size_t*)
  SPARSE_ENGINE_ORT_FUNCTION(90, Status*, KernelContext_GetInput, const KernelContext*, size_t, const Value**)
  SPARSE_ENGINE_ORT_FUNCTION(91, Status*, KernelContext_GetOutput, KernelContext*, size_t, const int64_t*, size_t,
                             Value**)
  SPARSE_ENGINE_ORT_FUNCTION(93, void, ReleaseStatus, Status*)
  SPARSE_ENGINE_ORT_FUNCTION(99, void, ReleaseTensorTypeAndShapeInfo, TensorTypeAndShapeInfo*)
  SPARSE_ENGINE_ORT_FUNCTION(249, Status*, KernelInfoGetConstantInput_tensor, const KernelInfo*, size_t, int*,
                             const Value**)
  // The result belongs to the runtime: it is not to be released.
  SPARSE_ENGINE_ORT_FUNCTION(268, Status*, ShapeInferContext_GetInputTypeShape, const ShapeInferContext*, size_t,
                             TensorTypeAndShapeInfo**)
  SPARSE_ENGINE_ORT_FUNCTION(269, Status*, ShapeInferContext_GetAttribute, const ShapeInferContext*, const char*,
                             const OpAttr**)
  SPARSE_ENGINE_ORT_FUNCTION(270, Status*, ShapeInferContext_SetOutputTypeShape, const ShapeInferContext*, size_t,
                             const TensorTypeAndShapeInfo*)
  SPARSE_ENGINE_ORT_FUNCTION(271, Status*, SetSymbolicDimensions, TensorTypeAndShapeInfo*, const char**, size_t)
  SPARSE_ENGINE_ORT_FUNCTION(272, Status*, ReadOpAttr, const OpAttr*, OpAttrType, void*, size_t, size_t*)
  SPARSE_ENGINE_ORT_FUNCTION(274, Status*, KernelContext_ParallelFor, const KernelContext*, void (*)(void*, size_t),
                             size_t total, size_t batches, void*)
};

#undef SPARSE_ENGINE_ORT_FUNCTION

// Version 17 of the structure: every callback of that version but CreateKernel and KernelCompute, which V2
// replaces, must be there.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, FunctionTable, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, FunctionTable, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};
static_assert(sizeof(CustomOp) == 22 * sizeof(void*), "the structure is an interface");

}  // namespace sparse_engine::ort
