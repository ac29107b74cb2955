// The operators of torch.ops.fastvae: schemas and, for each, its operands by name.
//
// In all of them `param` is 0 logvar, 1 log_std, 2 std, 3 var; a Gaussian whose second tensor is
// none is packed, its halves lying along `packed_dim`; `needs` has bit i set if the gradient of the
// i-th differentiable argument is wanted, and what is not wanted comes back undefined (None).
// `bound` is none, or applies to `logvar`: 0 hard, 1 soft or 2 straight-through, low, high.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>

#include "call.h"

namespace fastvae {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four four(const Gradients& g) {
  return {g[0], g[1], g.size() > 2 ? g[2] : Tensor(), g.size() > 3 ? g[3] : Tensor()};
}

// q, and p if it is given. Returns how many inputs that is.
int gaussians(Call& call, const Tensor& mu, const OptionalTensor& logvar,
              const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
              int64_t packed_dim) {
  call.gaussian("mu", mu, "logvar", logvar, packed_dim);
  if (!prior_mu && prior_logvar)
    throw std::runtime_error("fastvae: prior_logvar is given without prior_mu");
  if (!prior_mu) return 2;
  call.gaussian("prior_mu", *prior_mu, "prior_logvar", prior_logvar, packed_dim);
  return 4;
}

Tensor rsample(const Tensor& mu, const OptionalTensor& logvar, const Tensor& seed, int64_t param,
               int64_t packed_dim, const std::vector<int64_t>& sample_shape,
               const OptionalBound& bound) {
  Call call("rsample", param, bound);
  call.gaussian("mu", mu, "logvar", logvar, packed_dim);
  call.noise(seed, to_dims(sample_shape));
  Tensor z = call.output();
  call.run<Rsample::Forward>();
  return z;
}

Two rsample_backward(const Tensor& grad_z, const Tensor& mu, const OptionalTensor& logvar,
                     const Tensor& seed, int64_t param, int64_t packed_dim,
                     const std::vector<int64_t>& sample_shape, int64_t needs,
                     const OptionalBound& bound) {
  Call call("rsample_backward", param, bound);
  call.gaussian("mu", mu, "logvar", logvar, packed_dim);
  call.grad_output(grad_z);
  call.noise(seed, to_dims(sample_shape));
  const Gradients grads = call.gradients(2, needs);
  call.run<Rsample::Backward>();
  return {grads[0], grads[1]};
}

Tensor kl_divergence(const Tensor& mu, const OptionalTensor& logvar, const OptionalTensor& prior_mu,
                     const OptionalTensor& prior_logvar, int64_t param, int64_t packed_dim,
                     int64_t event_ndim, const OptionalBound& bound) {
  Call call("kl_divergence", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.rows(event_ndim);
  Tensor kl = call.value();
  n == 2 ? call.run<KLDivergence<2>::Forward>() : call.run<KLDivergence<4>::Forward>();
  return kl;
}

Four kl_divergence_backward(const Tensor& grad_kl, const Tensor& mu, const OptionalTensor& logvar,
                            const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                            int64_t param, int64_t packed_dim, int64_t event_ndim, int64_t needs,
                            const OptionalBound& bound) {
  Call call("kl_divergence_backward", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.rows(event_ndim);
  call.grad_value(grad_kl);
  const Gradients grads = call.gradients(n, needs);
  n == 2 ? call.run<KLDivergence<2>::Backward>() : call.run<KLDivergence<4>::Backward>();
  return four(grads);
}

Two rsample_kl(const Tensor& mu, const OptionalTensor& logvar, const OptionalTensor& prior_mu,
               const OptionalTensor& prior_logvar, const Tensor& seed, int64_t param,
               int64_t packed_dim, int64_t event_ndim, const OptionalBound& bound) {
  Call call("rsample_kl", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.noise(seed);
  call.rows(event_ndim);
  Tensor z = call.output();
  Tensor kl = call.value();
  n == 2 ? call.run<RsampleKL<2>::Forward>() : call.run<RsampleKL<4>::Forward>();
  return {z, kl};
}

Four rsample_kl_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mu,
                         const OptionalTensor& logvar, const OptionalTensor& prior_mu,
                         const OptionalTensor& prior_logvar, const Tensor& seed, int64_t param,
                         int64_t packed_dim, int64_t event_ndim, int64_t needs,
                         const OptionalBound& bound) {
  Call call("rsample_kl_backward", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.grad_output(grad_z);
  call.noise(seed);
  call.rows(event_ndim);
  call.grad_value(grad_kl);
  const Gradients grads = call.gradients(n, needs);
  n == 2 ? call.run<RsampleKL<2>::Backward>() : call.run<RsampleKL<4>::Backward>();
  return four(grads);
}

// `path_derivative` is for the backward pass.
Two rsample_log_ratio(const Tensor& mu, const OptionalTensor& logvar,
                      const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                      const Tensor& seed, int64_t param, int64_t packed_dim, int64_t event_ndim,
                      const std::vector<int64_t>& sample_shape, bool, const OptionalBound& bound) {
  Call call("rsample_log_ratio", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.noise(seed, to_dims(sample_shape));
  call.rows(event_ndim);
  Tensor z = call.output();
  Tensor log_ratio = call.value();
  n == 2 ? call.run<RsampleLogRatio<2>::Forward>() : call.run<RsampleLogRatio<4>::Forward>();
  return {z, log_ratio};
}

Four rsample_log_ratio_backward(const Tensor& grad_z, const Tensor& grad_log_ratio,
                                const Tensor& mu, const OptionalTensor& logvar,
                                const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                const Tensor& seed, int64_t param, int64_t packed_dim,
                                int64_t event_ndim, const std::vector<int64_t>& sample_shape,
                                bool path_derivative, int64_t needs, const OptionalBound& bound) {
  Call call("rsample_log_ratio_backward", param, bound);
  const int n = gaussians(call, mu, logvar, prior_mu, prior_logvar, packed_dim);
  call.grad_output(grad_z);
  call.noise(seed, to_dims(sample_shape));
  call.rows(event_ndim);
  call.grad_value(grad_log_ratio);
  const Gradients grads = call.gradients(n, needs);
  const auto run = [&]<int N>(RsampleLogRatio<N>) {
    path_derivative ? call.run<typename RsampleLogRatio<N>::PathBackward>()
                    : call.run<typename RsampleLogRatio<N>::Backward>();
  };
  n == 2 ? run(RsampleLogRatio<2>()) : run(RsampleLogRatio<4>());
  return four(grads);
}

// Without a tensor `logvar`, the number `scale` stands for it.
void log_prob_operands(Call& call, const Tensor& x, const Tensor& mean,
                       const OptionalTensor& logvar, double scale, int64_t event_ndim) {
  call.input("x", x);
  call.input("mean", mean);
  logvar ? call.input("logvar", *logvar) : call.constant(scale);
  call.rows(event_ndim);
}

Tensor gaussian_log_prob(const Tensor& x, const Tensor& mean, const OptionalTensor& logvar,
                         double scale, int64_t param, int64_t event_ndim,
                         const OptionalBound& bound) {
  Call call("gaussian_log_prob", param, bound);
  log_prob_operands(call, x, mean, logvar, scale, event_ndim);
  Tensor log_prob = call.value();
  call.run<GaussianLogProb::Forward>();
  return log_prob;
}

Three gaussian_log_prob_backward(const Tensor& grad_log_prob, const Tensor& x, const Tensor& mean,
                                 const OptionalTensor& logvar, double scale, int64_t param,
                                 int64_t event_ndim, int64_t needs, const OptionalBound& bound) {
  Call call("gaussian_log_prob_backward", param, bound);
  log_prob_operands(call, x, mean, logvar, scale, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(3, needs);
  call.run<GaussianLogProb::Backward>();
  return {grads[0], grads[1], grads[2]};
}

// The rows' log-probabilities and, for their upstream gradients `grad_log_prob`, the gradients.
Four gaussian_log_prob_with_grad(const Tensor& grad_log_prob, const Tensor& x, const Tensor& mean,
                                 const OptionalTensor& logvar, double scale, int64_t param,
                                 int64_t event_ndim, int64_t needs, const OptionalBound& bound) {
  Call call("gaussian_log_prob_with_grad", param, bound);
  log_prob_operands(call, x, mean, logvar, scale, event_ndim);
  call.grad_value(grad_log_prob);
  const Gradients grads = call.gradients(3, needs);
  if (call.sums_gradients_on_gpu()) {  // where a loop sums either those or values
    const auto [grad_x, grad_mean, grad_logvar] = gaussian_log_prob_backward(
        grad_log_prob, x, mean, logvar, scale, param, event_ndim, needs, bound);
    return {gaussian_log_prob(x, mean, logvar, scale, param, event_ndim, bound), grad_x, grad_mean,
            grad_logvar};
  }
  Tensor log_prob = call.value();
  call.run<GaussianLogProb::ForwardBackward>();
  return {log_prob, grads[0], grads[1], grads[2]};
}

// gradient *= factor, a 0-d tensor on the same device, unless that is 1: then nothing is read or
// written, and the host need not wait to know. On the CPU the caller knows.
void scale_(Tensor gradient, const Tensor& factor) {
  Call call("scale_");
  call.input("gradient", gradient);
  call.scale(factor);
}

// The same function serves every device; Call chooses the kernel.
template <class Library>
void implement(Library& m) {
  m.impl("rsample", TORCH_BOX(&rsample));
  m.impl("rsample_backward", TORCH_BOX(&rsample_backward));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
  m.impl("rsample_kl", TORCH_BOX(&rsample_kl));
  m.impl("rsample_kl_backward", TORCH_BOX(&rsample_kl_backward));
  m.impl("rsample_log_ratio", TORCH_BOX(&rsample_log_ratio));
  m.impl("rsample_log_ratio_backward", TORCH_BOX(&rsample_log_ratio_backward));
  m.impl("gaussian_log_prob", TORCH_BOX(&gaussian_log_prob));
  m.impl("gaussian_log_prob_backward", TORCH_BOX(&gaussian_log_prob_backward));
  m.impl("gaussian_log_prob_with_grad", TORCH_BOX(&gaussian_log_prob_with_grad));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace

STABLE_TORCH_LIBRARY(fastvae, m) {
  m.def(
      "rsample(Tensor mu, Tensor? logvar, Tensor seed, int param, int packed_dim, "
      "int[] sample_shape, float[]? bound=None) -> Tensor");
  m.def(
      "rsample_backward(Tensor grad_z, Tensor mu, Tensor? logvar, Tensor seed, int param, "
      "int packed_dim, int[] sample_shape, int needs, float[]? bound=None) -> (Tensor, Tensor)");
  m.def(
      "kl_divergence(Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, int param, "
      "int packed_dim, int event_ndim, float[]? bound=None) -> Tensor");
  m.def(
      "kl_divergence_backward(Tensor grad_kl, Tensor mu, Tensor? logvar, Tensor? prior_mu, "
      "Tensor? prior_logvar, int param, int packed_dim, int event_ndim, int needs, "
      "float[]? bound=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rsample_kl(Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, "
      "int param, int packed_dim, int event_ndim, float[]? bound=None) -> (Tensor, Tensor)");
  m.def(
      "rsample_kl_backward(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor? logvar, "
      "Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, int param, int packed_dim, "
      "int event_ndim, int needs, float[]? bound=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rsample_log_ratio(Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor seed, int param, int packed_dim, int event_ndim, int[] sample_shape, "
      "bool path_derivative, float[]? bound=None) -> (Tensor, Tensor)");
  m.def(
      "rsample_log_ratio_backward(Tensor grad_z, Tensor grad_log_ratio, Tensor mu, "
      "Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, int param, "
      "int packed_dim, int event_ndim, int[] sample_shape, bool path_derivative, int needs, "
      "float[]? bound=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gaussian_log_prob(Tensor x, Tensor mean, Tensor? logvar, float scale, int param, "
      "int event_ndim, float[]? bound=None) -> Tensor");
  m.def(
      "gaussian_log_prob_backward(Tensor grad_log_prob, Tensor x, Tensor mean, Tensor? logvar, "
      "float scale, int param, int event_ndim, int needs, float[]? bound=None) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "gaussian_log_prob_with_grad(Tensor grad_log_prob, Tensor x, Tensor mean, Tensor? logvar, "
      "float scale, int param, int event_ndim, int needs, float[]? bound=None) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { implement(m); }

}  // namespace fastvae
