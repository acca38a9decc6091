// The entry point that ONNX Runtime calls:
// SessionOptions.register_custom_ops_library("libsparse_engine_kernels.so").
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "ort_attention.h"
#include "ort_conv24.h"
#include "ort_conv_int8.h"
#include "ort_group_norm.h"
#include "ort_int8.h"
#include "ort_layers_bf16.h"
#include "ort_matmul24.h"
#include "ort_mlp.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The domain and its operators, for one runtime. They must outlive every session, so they are never freed.
struct Registration {
  explicit Registration(FunctionTable table)
      : api(table), operators{matmul24(table),       matmul_bf16(table), mlp24(table),    mlp_bf16(table),
                              self_attention(table), attention(table),   conv24(table),   group_norm(table),
                              layers_int8(table),    layers_bf16(table), conv_int8(table)} {
    check(api, api.CreateCustomOpDomain("sparse_engine", &domain));
    for (Operator& op : operators) check(api, api.CustomOpDomain_Add(domain, &op));
  }
  const Api api;
  CustomOpDomain* domain = nullptr;
  std::array<Operator, 11> operators;
};

// A process may hold two runtimes, for instance one inside another library.
CustomOpDomain* domain_for(FunctionTable table) {
  static std::mutex mutex;
  static std::map<FunctionTable, std::unique_ptr<Registration>> registrations;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Registration>& registration = registrations[table];
  if (!registration) registration = std::make_unique<Registration>(table);
  return registration->domain;
}

// Every version has had CreateStatus in the first place, so even a runtime that is too old can be told so.
Status* refuse_old_runtime(const ApiBase* base) {
  const Api::CreateStatusFunction create_status =
      reinterpret_cast<Api::CreateStatusFunction>(const_cast<void*>(base->GetApi(1)[0]));
  const std::string message = std::string("sparse-engine kernels need ONNX Runtime 1.17 or newer, this is ") +
                              base->GetVersionString() + "; pip install -U onnxruntime";
  return create_status(kNotImplemented, message.c_str());
}

}  // namespace
}  // namespace sparse_engine::ort

extern "C" __attribute__((visibility("default"))) sparse_engine::ort::Status* RegisterCustomOps(
    sparse_engine::ort::SessionOptions* options, const sparse_engine::ort::ApiBase* base) {
  using namespace sparse_engine::ort;
  const FunctionTable table = base->GetApi(kApiVersion);
  if (!table) return refuse_old_runtime(base);
  const Api api(table);
  return guarded(api, "sparse_engine", [&] { check(api, api.AddCustomOpDomain(options, domain_for(table))); });
}
