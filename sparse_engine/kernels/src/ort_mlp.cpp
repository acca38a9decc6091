#include "ort_mlp.h"

#include "dispatch.h"
#include "ort_matmul24.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The two operators differ in how their weights are given.
struct Sparse {
  static constexpr const char* kName = "Mlp24";
  static constexpr bool kIsSparse = true;
  static constexpr const char* kDefaultCompute = "fp32";
  enum Input : size_t { kX, kFirst, kFirstBias = 3, kSecond, kSecondBias = 6, kResidual, kInputCount };
};
struct Dense {
  static constexpr const char* kName = "MlpBf16";
  static constexpr bool kIsSparse = false;
  static constexpr const char* kDefaultCompute = "bf16";
  enum Input : size_t { kX, kFirst, kFirstBias, kSecond, kSecondBias, kResidual, kInputCount };
};

// One node of one session.
template <class Form>
class Kernel : public Form {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        activation_(parse_activation(string_attribute(api, info, "activation", "none"))),
        threads_(threads_attribute(api, info)),
        tier_(best_tier(parse_compute_is_bfloat16(string_attribute(api, info, "compute", Form::kDefaultCompute)))),
        lanes_(parse_lanes(string_attribute(api, info, "tactic", "t-lanes"))),
        first_(weights(info, "H", "K", Form::kFirst), tier_, lanes_),
        second_(weights(info, "N", "H", Form::kSecond), tier_, lanes_) {
    first_.page_out_weights();
    second_.page_out_weights();
  }

  static ElementType input_type(size_t index) {
    return Form::kIsSparse && (index == Form::kFirst + 1 || index == Form::kSecond + 1) ? kUint8 : kFloat;
  }
  static bool is_optional(size_t index) { return index == Form::kFirstBias || index >= Form::kSecondBias; }
  static void infer_shape(const Api& api, ShapeInferContext* context) { infer_rows(api, context); }
  const Api& api() const { return api_; }

  void compute(KernelContext* context) const {
    const Tensor x = input(api_, context, Form::kX);
    const size_t tokens = tokens_of(x.shape, first_.depth());
    Shape shape = x.shape;
    shape.back() = second_.rows();
    Epilogue hidden, epilogue;
    hidden.activation = activation_;
    hidden.bias = bias_input(api_, context, Form::kFirstBias, "bias1", first_.rows());
    epilogue.bias = bias_input(api_, context, Form::kSecondBias, "bias2", second_.rows());
    epilogue.residual = residual_input(api_, context, Form::kResidual, shape);
    float* const y = allocate_output(api_, context, shape);
    MatMul24::run_pair(first_, hidden, second_, epilogue, x.floats(), tokens, y, threads_, parallel_for(api_, context));
  }

 private:
  Weights24 weights(const KernelInfo* info, const char* rows, const char* depth, size_t index) const {
    return weights_input(api_, info, int_attribute(api_, info, rows), int_attribute(api_, info, depth), index,
                         Form::kIsSparse);
  }

  const Api api_;
  Activation activation_;
  int threads_;
  Tier tier_;
  Lanes lanes_;
  MatMul24 first_, second_;
};

}  // namespace

Operator mlp24(FunctionTable table) { return operator_of<Kernel<Sparse>>(table); }
Operator mlp_bf16(FunctionTable table) { return operator_of<Kernel<Dense>>(table); }

}  // namespace sparse_engine::ort
