#include "ort_conv_int8.h"

#include <algorithm>

#include "convolution_int8.h"
#include "dispatch.h"
#include "ort_conv24.h"
#include "ort_int8.h"

namespace sparse_engine::ort {
namespace {

// One node of one session.
class Kernel {
 public:
  static constexpr const char* kName = "ConvInt8";
  enum Input : size_t { kX, kCodes, kValues, kPositions, kScales, kBias, kInputCount = 8 };

  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(threads_attribute(api, info)),
        conv_(make(api, info)) {}

  static ElementType input_type(size_t index) {
    if (index == kValues) return kInt8;
    return index == kCodes || index == kPositions ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index < kValues || index >= kBias; }
  const Api& api() const { return api_; }

  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_shape_from_either(api, context, kX, kCodes, [&](Shape& shape, std::vector<const char*>& names) {
      if (shape.size() != 4) return;
      if (int_attribute(api, context, "codes")) {  // their channels come last
        std::rotate(shape.begin() + 1, shape.begin() + 3, shape.end());
        std::rotate(names.begin() + 1, names.begin() + 3, names.end());
      }
      shape[1] = int_attribute(api, context, "N");
      names[1] = "";
      infer_places(api, context, 2, shape, names);
    });
  }

  void compute(KernelContext* context) const {
    ImagesInt8 images;
    Shape given;  // [B, C, H, W]
    if (const auto codes = optional_input(api_, context, kCodes)) {
      images.codes = static_cast<const uint8_t*>(codes->data);
      given = codes->shape;
      if (given.size() == 4) std::rotate(given.begin() + 1, given.begin() + 3, given.end());
    } else {
      const Tensor x = input(api_, context, kX);
      images.maps = x.floats();
      given = x.shape;
    }
    if (given.size() != 4 || given[1] != conv_.channels()) {
      fail("X has shape " + to_string(given) + ", expected [B, C, H, W] with C = " + std::to_string(conv_.channels()));
    }
    const ImageSizes sizes = conv_.sizes(given[2], given[3]);
    ConvEpilogue epilogue;
    epilogue.epilogue.activation = activation_;
    const Shape shape = {given[0], conv_.rows(), sizes.out_height, sizes.out_width};
    float* const y = output_and_epilogue(api_, context, kBias, shape, &epilogue);
    conv_.run(images, size_t(given[0]), sizes, y, epilogue, threads_, parallel_for(api_, context));
  }

 private:
  static ConvInt8 make(const Api& api, const KernelInfo* info) {
    const Window window = window_attributes(api, info);
    const int64_t depth = int64_t(small_attribute(api, info, "C", 0)) * window.taps();
    const Int8Input given = int8_weights_input(api, info, int_attribute(api, info, "N"), depth, kValues);
    ConvInt8 conv(given.weights, given.scales, window, codes_attribute(api, info, "x"), best_conv_int8_tactic().tier);
    given.page_out();
    return conv;
  }

  const Api api_;
  Activation activation_;
  int threads_;
  ConvInt8 conv_;
};

}  // namespace

Operator conv_int8(FunctionTable table) { return operator_of<Kernel>(table); }

}  // namespace sparse_engine::ort
