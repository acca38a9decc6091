// The one exception of this library. It is caught at each boundary (C functions, ONNX Runtime callbacks).
#pragma once

#include <stdexcept>
#include <string>

namespace sparse_engine {

// What went wrong, as the C functions return it.
enum class Status : int { kOk = 0, kInvalidInput = 1, kUnsupported = 2, kFailed = 3 };

class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status(status) {}
  const Status status;
};

}  // namespace sparse_engine
