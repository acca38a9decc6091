// ONNX Runtime's C interface in C++ terms: a failed call is an exception, a tensor knows its shape.
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "error.h"
#include "ort_abi.h"
#include "product24.h"

namespace sparse_engine::ort {

using Shape = std::vector<int64_t>;  // -1 where a dimension is not known yet

std::string to_string(const Shape& shape);

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

int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name);
int64_t int_attribute(const Api& api, const KernelInfo* info, const char* name, int64_t missing);
std::string string_attribute(const Api& api, const KernelInfo* info, const char* name, const char* missing);

// A loop over the session's own threads.
ParallelFor parallel_for(const Api& api, const KernelContext* context);

// The callbacks that are the same for every operator of this library: CPU, one float output, not variadic.
CustomOp common_callbacks();

}  // namespace sparse_engine::ort
