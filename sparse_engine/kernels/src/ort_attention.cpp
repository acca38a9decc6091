#include "ort_attention.h"

#include <cmath>
#include <limits>

#include "dispatch.h"
#include "ort_support.h"
#include "self_attention.h"

namespace sparse_engine::ort {
namespace {

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
  static constexpr const char* kName = "SelfAttention";
  static constexpr size_t kInputCount = 1;

  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        heads_(heads_attribute(api, info)),
        scale_(scale_attribute(api, info)),
        threads_(threads_attribute(api, info)),
        tier_(best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", "fp32")))) {}

  static ElementType input_type(size_t) { return kFloat; }
  static bool is_optional(size_t) { return false; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_last_dimension(api, context, [](int64_t width) { return width > 0 ? width / 3 : width; });
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
      fail("qkv has shape " + to_string(shape) +
           ", expected [B, L, 3 D] with D a multiple of heads = " + std::to_string(heads_));
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

}  // namespace

Operator self_attention(FunctionTable table) { return operator_of<Kernel>(table); }

}  // namespace sparse_engine::ort
