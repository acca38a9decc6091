#include "ort_attention.h"

#include <cmath>
#include <limits>

#include "attention_loop.h"
#include "dispatch.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

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

// In 8 bits there is one, and no substitute.
Tier tier_of(const std::string& compute) {
  if (compute != "int8") return best_tier(parse_compute_is_bfloat16(compute));
  const Tier tier = best_int8_tier();
  if (tier != Tier::kAvx512Vnni) {
    throw Error(sparse_engine::Status::kUnsupported, "attention in 8 bits needs AVX512-VNNI and AVX512-VBMI");
  }
  return tier;
}

// What the nodes of both operators are told.
struct Settings {
  Settings(const Api& api, const KernelInfo* info)
      : heads(heads_attribute(api, info)),
        scale(scale_attribute(api, info)),
        threads(threads_attribute(api, info)),
        tier(tier_of(string_attribute(api, info, "compute", "fp32"))) {}

  // An attention of `head_dim` numbers a head, its tensors and lengths yet to be said.
  Attention attention(int64_t head_dim) const {
    Attention attention;
    attention.heads = heads;
    attention.head_dim = int(head_dim);
    attention.scale = scale.value_or(1.0f / std::sqrt(float(head_dim)));
    return attention;
  }

  int heads;
  std::optional<float> scale;
  int threads;
  Tier tier;
};

constexpr int64_t kMostDims = std::numeric_limits<int>::max();

// Runs it into the node's output.
void run(const Api& api, KernelContext* context, const Settings& settings, Attention& attention) {
  const Shape shape = {int64_t(attention.batch), int64_t(attention.queries), int64_t(attention.width())};
  attention.output = allocate_output(api, context, shape, attention.output_element);
  run_attention(attention, settings.tier, settings.threads, parallel_for(api, context));
}

// One node of one session.
class SelfAttentionNode {
 public:
  static constexpr const char* kName = "SelfAttention";
  static constexpr size_t kInputCount = 2;

  SelfAttentionNode(const Api& api, const KernelInfo* info)
      : api_(api),
        settings_(api, info),
        element_(element_attribute(api, info)),
        codes_(codes_attribute(api, info, "y")) {}

  static ElementType input_type(size_t index) { return index == 0 ? kFloat : kBfloat16; }
  static bool is_optional(size_t) { return true; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_shape_from_either(api, context, 0, 1, [](Shape& shape, std::vector<const char*>& names) {
      shape.back() = shape.back() > 0 ? shape.back() / 3 : shape.back();
      names.back() = "";
    });
  }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const std::optional<Tensor> halves = optional_input(api_, context, 1);
    const Tensor qkv = halves ? *halves : input(api_, context, 0);
    Attention attention = dimensions(qkv.shape);
    attention.input_element = halves ? Element::kBfloat16 : Element::kFloat32;
    attention.output_element = element_;
    attention.codes = codes_;
    const size_t width = attention.width(), bytes = width * (halves ? sizeof(uint16_t) : sizeof(float));
    attention.q = {qkv.data, attention.queries * 3 * width, 3 * width, size_t(attention.head_dim)};
    attention.k = attention.v = attention.q;
    attention.k.data = static_cast<const char*>(qkv.data) + bytes;
    attention.v.data = static_cast<const char*>(qkv.data) + 2 * bytes;
    run(api_, context, settings_, attention);
  }

 private:
  Attention dimensions(const Shape& shape) const {
    const int64_t heads = settings_.heads;
    const int64_t head_dim = shape.size() == 3 ? shape[2] / (3 * heads) : 0;
    if (head_dim < 1 || head_dim > kMostDims || head_dim * heads * 3 != shape[2]) {
      fail("qkv has shape " + to_string(shape) +
           ", expected [B, L, 3 D] with D a multiple of heads = " + std::to_string(heads));
    }
    Attention attention = settings_.attention(head_dim);
    attention.batch = size_t(shape[0]);
    attention.queries = attention.keys = size_t(shape[1]);
    return attention;
  }

  const Api api_;
  Settings settings_;
  Element element_;
  Codes codes_;
};

// The sizes of a tensor [B, L, D] or [B, heads, L, D / heads].
struct Sizes {
  int64_t batch, tokens, head_dim;
};

// One node of one session.
class AttentionNode {
 public:
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputCount = 4;

  AttentionNode(const Api& api, const KernelInfo* info) : api_(api), settings_(api, info) {}

  static ElementType input_type(size_t) { return kFloat; }
  static bool is_optional(size_t index) { return index == 3; }
  static void infer_shape(const Api& api, ShapeInferContext* context) {
    infer_from_first(api, context, [](Shape& shape, std::vector<const char*>& names) {
      if (shape.size() != 4) return;
      const bool known = shape[1] > 0 && shape[3] > 0;
      shape = {shape[0], shape[2], known ? shape[1] * shape[3] : -1};
      names = {names[0], names[2], ""};
    });
  }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor q = input(api_, context, 0), k = input(api_, context, 1), v = input(api_, context, 2);
    const Sizes sizes = sizes_of("q", q.shape), keys = sizes_of("k", k.shape), values = sizes_of("v", v.shape);
    if (keys.batch != sizes.batch || keys.head_dim != sizes.head_dim || keys.tokens < 1) {
      fail("k has shape " + to_string(k.shape) + ", expected the batch and the heads of q, " + to_string(q.shape) +
           ", and 1 token or more");
    }
    if (values.batch != keys.batch || values.head_dim != keys.head_dim || values.tokens != keys.tokens) {
      fail("v has shape " + to_string(v.shape) + ", expected the batch, tokens and heads of k, " + to_string(k.shape));
    }
    Attention attention = settings_.attention(sizes.head_dim);
    attention.batch = size_t(sizes.batch);
    attention.queries = size_t(sizes.tokens);
    attention.keys = size_t(keys.tokens);
    attention.q = vectors(q, sizes);
    attention.k = vectors(k, keys);
    attention.v = vectors(v, values);
    const std::optional<Tensor> bias = optional_input(api_, context, 3);
    if (bias) attention.bias = bias_of(*bias, attention);
    run(api_, context, settings_, attention);
  }

 private:
  Sizes sizes_of(const char* name, const Shape& shape) const {
    const int64_t heads = settings_.heads;
    Sizes sizes = {0, 0, 0};
    if (shape.size() == 3 && shape[2] % heads == 0) sizes = {shape[0], shape[1], shape[2] / heads};
    if (shape.size() == 4 && shape[1] == heads) sizes = {shape[0], shape[2], shape[3]};
    if (sizes.head_dim < 1 || sizes.head_dim > kMostDims) {
      const std::string count = std::to_string(heads);
      fail(std::string(name) + " has shape " + to_string(shape) + ", expected [B, L, D] with D a multiple of heads = " +
           count + ", or [B, " + count + ", L, D / " + count + "]");
    }
    return sizes;
  }

  HeadVectors vectors(const Tensor& tensor, const Sizes& sizes) const {
    const size_t heads = size_t(settings_.heads), dim = size_t(sizes.head_dim), tokens = size_t(sizes.tokens);
    const size_t batch_stride = heads * tokens * dim;
    if (tensor.shape.size() == 3) return {tensor.floats(), batch_stride, heads * dim, dim};
    return {tensor.floats(), batch_stride, dim, tokens * dim};
  }

  static Bias bias_of(const Tensor& tensor, const Attention& attention) {
    const Shape& shape = tensor.shape;
    const Shape full = {int64_t(attention.batch), attention.heads, int64_t(attention.queries), int64_t(attention.keys)};
    bool fits = shape.size() == 4 && shape[3] == full[3];
    for (size_t i = 0; fits && i < 3; ++i) fits = shape[i] == 1 || shape[i] == full[i];
    if (!fits) {
      fail("bias has shape " + to_string(shape) + ", expected " + to_string(full) + ", or 1 for any but the last");
    }
    Bias bias;
    bias.data = tensor.floats();
    bias.query_stride = shape[2] == 1 ? 0 : attention.keys;
    bias.head_stride = shape[1] == 1 ? 0 : size_t(shape[2]) * attention.keys;
    bias.batch_stride = shape[0] == 1 ? 0 : size_t(shape[1] * shape[2]) * attention.keys;
    return bias;
  }

  const Api api_;
  Settings settings_;
};

}  // namespace

Operator self_attention(FunctionTable table) { return operator_of_elements<SelfAttentionNode>(table); }
Operator attention(FunctionTable table) { return operator_of<AttentionNode>(table); }

}  // namespace sparse_engine::ort
