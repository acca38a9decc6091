#include "ort_mlp.h"

#include "ort_matmul24.h"
#include "ort_support.h"

namespace sparse_engine::ort {
namespace {

// The two operators differ in how their weights are given.
struct Sparse : SparseForm {
  static constexpr const char* kName = "Mlp24";
  enum Input : size_t { kX, kFirst, kFirstBias = 3, kSecond, kSecondBias = 6, kResidual, kInputCount };
};
struct Dense : DenseForm {
  static constexpr const char* kName = "MlpBf16";
  enum Input : size_t { kX, kFirst, kFirstBias, kSecond, kSecondBias, kResidual, kInputCount };
};

// One node of one session.
template <class Form>
class Kernel : public Form {
 public:
  Kernel(const Api& api, const KernelInfo* info)
      : api_(api),
        attributes_(api, info, Form::kDefaultCompute),
        first_(weights(info, "H", "K", Form::kFirst), attributes_.tier, attributes_.lanes),
        second_(weights(info, "N", "H", Form::kSecond), attributes_.tier, attributes_.lanes) {
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
    const Given given(api_, context, first_.depth(), second_.rows());
    Epilogue hidden, epilogue;
    hidden.activation = attributes_.activation;
    hidden.bias = bias_input(api_, context, Form::kFirstBias, "bias1", first_.rows());
    epilogue.bias = bias_input(api_, context, Form::kSecondBias, "bias2", second_.rows());
    epilogue.residual = residual_input(api_, context, Form::kResidual, given.shape);
    float* const y = allocate_output(api_, context, given.shape);
    MatMul24::run_pair(first_, hidden, second_, epilogue, given.x, given.tokens, y, attributes_.threads,
                       parallel_for(api_, context));
  }

 private:
  Weights24 weights(const KernelInfo* info, const char* rows, const char* depth, size_t index) const {
    return weights_input(api_, info, int_attribute(api_, info, rows), int_attribute(api_, info, depth), index,
                         Form::kIsSparse);
  }

  const Api api_;
  ProductAttributes attributes_;
  MatMul24 first_, second_;
};

}  // namespace

Operator mlp24(FunctionTable table) { return operator_of<Kernel<Sparse>>(table); }
Operator mlp_bf16(FunctionTable table) { return operator_of<Kernel<Dense>>(table); }

}  // namespace sparse_engine::ort
