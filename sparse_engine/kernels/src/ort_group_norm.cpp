#include "ort_group_norm.h"

#include <algorithm>

#include "dispatch.h"
#include "group_norm_loop.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// One node of one session.
class GroupNormNode {
 public:
  static constexpr const char* kName = "GroupNorm";
  static constexpr size_t kInputCount = 5;

  GroupNormNode(const Api& api, const KernelInfo* info)
      : api_(api),
        groups_(groups_attribute(api, info)),
        epsilon_(epsilon_attribute(api, info)),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        element_(element_attribute(api, info)),
        codes_(codes_attribute(api, info, "y")),
        threads_(threads_attribute(api, info)),
        tier_(best_tier(false)) {
    if (element_ == Element::kBfloat16) fail("attribute output = 1, expected 0 or 2");
  }

  static ElementType input_type(size_t) { return kFloat; }
  static bool is_optional(size_t index) { return index > 0; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    const Element element = inferred_element(api, context);
    infer_shape_from(api, context, 0, element, [=](Shape& shape, std::vector<const char*>& names) {
      if (element == Element::kFloat32 || shape.size() < 2) return;  // channels go to the end
      std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
      std::rotate(names.begin() + 1, names.begin() + 2, names.end());
    });
  }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, 0);
    if (x.shape.size() < 3) fail("X has shape " + to_string(x.shape) + ", expected [B, C, L] or [B, C, H, W]");
    GroupNorm norm;
    norm.batch = size_t(x.shape[0]);
    norm.channels = size_t(x.shape[1]);
    norm.area = 1;
    for (size_t axis = 2; axis < x.shape.size(); ++axis) norm.area *= size_t(x.shape[axis]);
    norm.groups = groups_;
    norm.epsilon = epsilon_;
    norm.activation = activation_;
    norm.input = x.floats();
    norm.gamma = of_channels(context, 1, "gamma", norm);
    norm.beta = of_channels(context, 2, "beta", norm);
    norm.scale = of_images(context, 3, "scale", norm, norm.scale_stride);
    norm.shift = of_images(context, 4, "shift", norm, norm.shift_stride);
    if (element_ == Element::kFloat32) {
      norm.output = allocate_output(api_, context, x.shape);
      run_group_norm(norm, tier_, threads_, parallel_for(api_, context));
      return;
    }
    Shape shape = x.shape;
    std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
    uint8_t* const codes = static_cast<uint8_t*>(allocate_output(api_, context, shape, element_));
    run_group_norm_to_codes(norm, codes_, codes, tier_, best_conv_int8_tactic(), threads_, parallel_for(api_, context));
  }

 private:
  static size_t groups_attribute(const Api& api, const KernelInfo* info) {
    const int64_t groups = int_attribute(api, info, "groups");
    if (groups < 1) fail("attribute groups = " + std::to_string(groups) + ", expected 1 or more");
    return size_t(groups);
  }

  static float epsilon_attribute(const Api& api, const KernelInfo* info) {
    const std::optional<float> epsilon = float_attribute(api, info, "epsilon");
    if (!epsilon) fail("attribute epsilon is missing");
    return *epsilon;
  }

  // The shape but for axes of size 1 at its end, of which `rank` stay.
  static Shape without_ones(Shape shape, size_t rank) {
    while (shape.size() > rank && shape.back() == 1) shape.pop_back();
    return shape;
  }

  const float* of_channels(KernelContext* context, size_t index, const char* name, const GroupNorm& norm) const {
    const std::optional<Tensor> tensor = optional_input(api_, context, index);
    if (!tensor) return nullptr;
    expect_shape(name, without_ones(tensor->shape, 1), {int64_t(norm.channels)});
    return tensor->floats();
  }

  const float* of_images(KernelContext* context, size_t index, const char* name, const GroupNorm& norm,
                         size_t& stride) const {
    const std::optional<Tensor> tensor = optional_input(api_, context, index);
    if (!tensor) return nullptr;
    const Shape shape = without_ones(tensor->shape, 2);
    const bool one = !shape.empty() && shape[0] == 1;
    expect_shape(name, shape, {one ? 1 : int64_t(norm.batch), int64_t(norm.channels)});
    stride = one ? 0 : norm.channels;
    return tensor->floats();
  }

  const Api api_;
  size_t groups_;
  float epsilon_;
  Activation activation_;
  Element element_;
  Codes codes_;
  int threads_;
  Tier tier_;
};

}  // namespace

Operator group_norm(FunctionTable table) { return operator_of_elements<GroupNormNode>(table); }

}  // namespace sparse_engine::ort
