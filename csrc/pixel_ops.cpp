// The operators of torch.ops.fastvae for pixels other than Gaussian ones, as those in ops.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

namespace fastvae {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

void logit_operands(Call& call, const Tensor& x, const Tensor& logits, int64_t event_ndim) {
  call.input("x", x);
  call.input("logits", logits);
  call.rows(event_ndim);
}

Tensor bernoulli_log_prob(const Tensor& x, const Tensor& logits, int64_t event_ndim) {
  Call call("bernoulli_log_prob");
  logit_operands(call, x, logits, event_ndim);
  Tensor log_prob = call.value();
  call.run<BernoulliLogProb::Forward>();
  return log_prob;
}

Two bernoulli_log_prob_backward(const Tensor& grad_log_prob, const Tensor& x, const Tensor& logits,
                                int64_t event_ndim, int64_t needs) {
  Call call("bernoulli_log_prob_backward");
  logit_operands(call, x, logits, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(2, needs);
  call.run<BernoulliLogProb::Backward>();
  return {grads[0], grads[1]};
}

Tensor continuous_bernoulli_log_prob(const Tensor& x, const Tensor& logits, int64_t event_ndim) {
  Call call("continuous_bernoulli_log_prob");
  logit_operands(call, x, logits, event_ndim);
  Tensor log_prob = call.value();
  call.run<ContinuousBernoulliLogProb::Forward>();
  return log_prob;
}

Two continuous_bernoulli_log_prob_backward(const Tensor& grad_log_prob, const Tensor& x,
                                           const Tensor& logits, int64_t event_ndim,
                                           int64_t needs) {
  Call call("continuous_bernoulli_log_prob_backward");
  logit_operands(call, x, logits, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(2, needs);
  call.run<ContinuousBernoulliLogProb::Backward>();
  return {grads[0], grads[1]};
}

// Without a tensor `log_scale`, the number `scale` stands for it.
void laplace_operands(Call& call, const Tensor& x, const Tensor& mean,
                      const OptionalTensor& log_scale, double scale, int64_t event_ndim) {
  call.input("x", x);
  call.input("mean", mean);
  log_scale ? call.input("log_scale", *log_scale) : call.constant(scale);
  call.rows(event_ndim);
}

Tensor laplace_log_prob(const Tensor& x, const Tensor& mean, const OptionalTensor& log_scale,
                        double scale, int64_t event_ndim) {
  Call call("laplace_log_prob");
  laplace_operands(call, x, mean, log_scale, scale, event_ndim);
  Tensor log_prob = call.value();
  call.run<LaplaceLogProb::Forward>();
  return log_prob;
}

Three laplace_log_prob_backward(const Tensor& grad_log_prob, const Tensor& x, const Tensor& mean,
                                const OptionalTensor& log_scale, double scale, int64_t event_ndim,
                                int64_t needs) {
  Call call("laplace_log_prob_backward");
  laplace_operands(call, x, mean, log_scale, scale, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(3, needs);
  call.run<LaplaceLogProb::Backward>();
  return {grads[0], grads[1], grads[2]};
}

void level_operands(Call& call, const Tensor& x, const Tensor& mean, const Tensor& log_scale,
                    int64_t bins, double low, double high, int64_t event_ndim) {
  call.input("x", x);
  call.input("mean", mean);
  call.input("log_scale", log_scale);
  call.levels(bins, low, high);
  call.rows(event_ndim);
}

Tensor discretized_logistic_log_prob(const Tensor& x, const Tensor& mean, const Tensor& log_scale,
                                     int64_t bins, double low, double high, int64_t event_ndim) {
  Call call("discretized_logistic_log_prob");
  level_operands(call, x, mean, log_scale, bins, low, high, event_ndim);
  Tensor log_prob = call.value();
  call.run<DiscretizedLogisticLogProb::Forward>();
  return log_prob;
}

Three discretized_logistic_log_prob_backward(const Tensor& grad_log_prob, const Tensor& x,
                                             const Tensor& mean, const Tensor& log_scale,
                                             int64_t bins, double low, double high,
                                             int64_t event_ndim, int64_t needs) {
  Call call("discretized_logistic_log_prob_backward");
  level_operands(call, x, mean, log_scale, bins, low, high, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(3, needs);
  call.run<DiscretizedLogisticLogProb::Backward>();
  return {grads[0], grads[1], grads[2]};
}

template <class Library>
void implement(Library& m) {
  m.impl("bernoulli_log_prob", TORCH_BOX(&bernoulli_log_prob));
  m.impl("bernoulli_log_prob_backward", TORCH_BOX(&bernoulli_log_prob_backward));
  m.impl("continuous_bernoulli_log_prob", TORCH_BOX(&continuous_bernoulli_log_prob));
  m.impl("continuous_bernoulli_log_prob_backward",
         TORCH_BOX(&continuous_bernoulli_log_prob_backward));
  m.impl("laplace_log_prob", TORCH_BOX(&laplace_log_prob));
  m.impl("laplace_log_prob_backward", TORCH_BOX(&laplace_log_prob_backward));
  m.impl("discretized_logistic_log_prob", TORCH_BOX(&discretized_logistic_log_prob));
  m.impl("discretized_logistic_log_prob_backward",
         TORCH_BOX(&discretized_logistic_log_prob_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("bernoulli_log_prob(Tensor x, Tensor logits, int event_ndim) -> Tensor");
  m.def(
      "bernoulli_log_prob_backward(Tensor grad_log_prob, Tensor x, Tensor logits, int event_ndim, "
      "int needs) -> (Tensor, Tensor)");
  m.def("continuous_bernoulli_log_prob(Tensor x, Tensor logits, int event_ndim) -> Tensor");
  m.def(
      "continuous_bernoulli_log_prob_backward(Tensor grad_log_prob, Tensor x, Tensor logits, "
      "int event_ndim, int needs) -> (Tensor, Tensor)");
  m.def(
      "laplace_log_prob(Tensor x, Tensor mean, Tensor? log_scale, float scale, int event_ndim) "
      "-> Tensor");
  m.def(
      "laplace_log_prob_backward(Tensor grad_log_prob, Tensor x, Tensor mean, Tensor? log_scale, "
      "float scale, int event_ndim, int needs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "discretized_logistic_log_prob(Tensor x, Tensor mean, Tensor log_scale, int bins, "
      "float low, float high, int event_ndim) -> Tensor");
  m.def(
      "discretized_logistic_log_prob_backward(Tensor grad_log_prob, Tensor x, Tensor mean, "
      "Tensor log_scale, int bins, float low, float high, int event_ndim, int needs) "
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { implement(m); }

}  // namespace fastvae
