#include "ort_conv24.h"

#include "dispatch.h"
#include "ort_matmul24.h"

namespace sparse_engine::ort {
namespace {

constexpr int64_t kMostAttribute = 1 << 20;

// One node of one session.
class Kernel {
 public:
  static constexpr const char* kName = "Conv24";
  enum Input : size_t { kX = 0, kValues = 1, kBias = 3, kInputCount = 6 };

  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(threads_attribute(api, info)),
        conv_(make(api, info)) {
    conv_.page_out_weights();
  }

  static ElementType input_type(size_t index) { return index == kValues + 1 ? kUint8 : kFloat; }
  static bool is_optional(size_t index) { return index >= kBias; }
  const Api& api() const { return api_; }

  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_from_first(api, context, [&](Shape& shape, std::vector<const char*>& names) {
      if (shape.size() != 4) return;
      shape[1] = int_attribute(api, context, "N");
      names[1] = "";
      infer_places(api, context, 2, shape, names);
    });
  }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, kX);
    if (x.shape.size() != 4 || x.shape[1] != conv_.channels()) {
      fail("X has shape " + to_string(x.shape) +
           ", expected [B, C, H, W] with C = " + std::to_string(conv_.channels()));
    }
    const ImageSizes sizes = conv_.sizes(x.shape[2], x.shape[3]);
    const Shape shape = {x.shape[0], conv_.rows(), sizes.out_height, sizes.out_width};
    ConvEpilogue epilogue;
    epilogue.epilogue.activation = activation_;
    float* const y = output_and_epilogue(api_, context, kBias, shape, &epilogue);
    conv_.run(x.floats(), size_t(x.shape[0]), sizes, y, epilogue, threads_, parallel_for(api_, context));
  }

 private:
  static Conv24 make(const Api& api, const KernelInfo* info) {
    const Window window = window_attributes(api, info);
    const int64_t depth = int64_t(small_attribute(api, info, "C", 0)) * window.taps();
    const Weights24 weights = weights_input(api, info, int_attribute(api, info, "N"), depth, kValues, true);
    const bool bfloat16 = parse_compute_is_bfloat16(string_attribute(api, info, "compute", "fp32"));
    return Conv24(weights, window, best_tier(bfloat16), parse_lanes(string_attribute(api, info, "tactic", "t-lanes")));
  }

  const Api api_;
  Activation activation_;
  int threads_;
  Conv24 conv_;
};

}  // namespace

int small_attribute(const Api& api, const KernelInfo* info, const char* name, int64_t missing) {
  const int64_t value = int_attribute(api, info, name, missing);
  if (value >= 0 && value <= kMostAttribute) return int(value);
  fail(std::string("attribute ") + name + " = " + std::to_string(value) + ", out of range");
}

Window window_attributes(const Api& api, const KernelInfo* info) {
  Window window;
  window.height = small_attribute(api, info, "kernel_h", 0);
  window.width = small_attribute(api, info, "kernel_w", 0);
  window.stride = small_attribute(api, info, "stride", 1);
  window.upsample = small_attribute(api, info, "upsample", 1);
  window.pad_top = small_attribute(api, info, "pad_top", 0);
  window.pad_left = small_attribute(api, info, "pad_left", 0);
  window.pad_bottom = small_attribute(api, info, "pad_bottom", 0);
  window.pad_right = small_attribute(api, info, "pad_right", 0);
  return window;
}

void infer_places(const Api& api, ShapeInferContext* context, size_t first, Shape& shape,
                  std::vector<const char*>& names) {
  const int64_t stride = int_attribute(api, context, "stride"), upsample = int_attribute(api, context, "upsample");
  const auto resize = [&](size_t axis, const char* before, const char* after, const char* kernel) {
    const int64_t pads = int_attribute(api, context, before) + int_attribute(api, context, after);
    if (shape[axis] >= 0) {
      shape[axis] = (shape[axis] * upsample + pads - int_attribute(api, context, kernel)) / stride + 1;
    }
    names[axis] = "";
  };
  resize(first, "pad_top", "pad_bottom", "kernel_h");
  resize(first + 1, "pad_left", "pad_right", "kernel_w");
}

float* output_and_epilogue(const Api& api, KernelContext* context, size_t bias, const Shape& shape,
                           ConvEpilogue* epilogue) {
  epilogue->epilogue.bias = bias_input(api, context, bias, "bias", int(shape[1]));
  epilogue->epilogue.residual = residual_input(api, context, bias + 2, shape);
  if (const auto image_bias = optional_input(api, context, bias + 1)) {
    expect_shape("image_bias", image_bias->shape, {shape[0], shape[1], 1, 1});
    epilogue->image_bias = image_bias->floats();
  }
  return allocate_output(api, context, shape);
}

Operator conv24(FunctionTable table) { return operator_of<Kernel>(table); }

}  // namespace sparse_engine::ort
