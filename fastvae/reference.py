"""The definition of the package in plain PyTorch.

The same names as the fused ops, the same noise from the same seed, differentiable any number of
times, on any device. The tests hold the kernels to it, and it computes where there are no kernels.
The formulas stand beside the ops, in `fastvae.ops`.

With lv = ln sigma^2, element by element and then summed over the last `event_ndim` dimensions:

- z = mu + e^{lv/2} eps
- KL(q || N(0, I)) = 1/2 (mu^2 + (e^lv - 1 - lv))
- KL(q || p) = 1/2 ((e^d - 1 - d) + (mu_q - mu_p)^2 e^{-lv_p}),  d = lv_q - lv_p
- ln p(z) - ln q(z) = 1/2 (lv_q - lv_p + eps^2 - (z - mu_p)^2 e^{-lv_p})
- log N(x; m, e^lv) = -1/2 ((x - m)^2 e^{-lv} + lv + ln 2 pi)
- ln Poisson(x; m) = x ln m - m - ln x!
- ln NB(x; m, t) = ln Gamma(x + t) - ln Gamma(t) - ln x! + t ln(t / (t + m)) + x ln(m / (t + m))

- categoricals: KL(q || p) = sum_i q_i ln(q_i / p_i), q_i = (1 - u) softmax(l)_i + u / classes
- mixture: ln sum_k w_k N(z; m_k, e^{lv_k}), of pairs alone without the sum

With a `bound`, lv of q and of the likelihood is what `Bound.__call__` gives. eps is what
`fastvae.ops.noise` says.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import backend, ops
from .ops.declare import definition_of
from .ops.elements import log_sigma, sigma
from .ops.noise import box_muller, noise, philox

__all__ = [
    "aggregate_log_prob",
    "balanced_categorical_kl_divergence",
    "balanced_kl_divergence",
    "bernoulli_log_prob",
    "bernoulli_nll_loss",
    "box_muller",
    "colour_mixture_log_prob",
    "colour_mixture_nll_loss",
    "continuous_bernoulli_log_prob",
    "continuous_bernoulli_nll_loss",
    "discretized_logistic_log_prob",
    "discretized_logistic_nll_loss",
    "gaussian_log_prob",
    "gaussian_nll_loss",
    "kl_divergence",
    "laplace_log_prob",
    "laplace_nll_loss",
    "log_sigma",
    "mixture_log_prob",
    "multinomial_log_prob",
    "multinomial_nll_loss",
    "negative_binomial_log_prob",
    "negative_binomial_nll_loss",
    "noise",
    "pairwise_log_prob",
    "philox",
    "poisson_log_prob",
    "poisson_nll_loss",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
    "sigma",
    "straight_through_categorical",
    "zero_inflated_negative_binomial_log_prob",
    "zero_inflated_negative_binomial_nll_loss",
]

rsample = definition_of(ops.rsample)
kl_divergence = definition_of(ops.kl_divergence)
straight_through_categorical = definition_of(ops.straight_through_categorical)
balanced_categorical_kl_divergence = definition_of(ops.balanced_categorical_kl_divergence)
balanced_kl_divergence = definition_of(ops.balanced_kl_divergence)
rsample_kl = definition_of(ops.rsample_kl)
rsample_log_ratio = definition_of(ops.rsample_log_ratio)
gaussian_log_prob = definition_of(ops.gaussian_log_prob)
gaussian_nll_loss = definition_of(ops.gaussian_nll_loss)
bernoulli_log_prob = definition_of(ops.bernoulli_log_prob)
bernoulli_nll_loss = definition_of(ops.bernoulli_nll_loss)
continuous_bernoulli_log_prob = definition_of(ops.continuous_bernoulli_log_prob)
continuous_bernoulli_nll_loss = definition_of(ops.continuous_bernoulli_nll_loss)
laplace_log_prob = definition_of(ops.laplace_log_prob)
laplace_nll_loss = definition_of(ops.laplace_nll_loss)
discretized_logistic_log_prob = definition_of(ops.discretized_logistic_log_prob)
discretized_logistic_nll_loss = definition_of(ops.discretized_logistic_nll_loss)
poisson_log_prob = definition_of(ops.poisson_log_prob)
poisson_nll_loss = definition_of(ops.poisson_nll_loss)
negative_binomial_log_prob = definition_of(ops.negative_binomial_log_prob)
negative_binomial_nll_loss = definition_of(ops.negative_binomial_nll_loss)
zero_inflated_negative_binomial_log_prob = definition_of(
    ops.zero_inflated_negative_binomial_log_prob
)
zero_inflated_negative_binomial_nll_loss = definition_of(
    ops.zero_inflated_negative_binomial_nll_loss
)
pairwise_log_prob = definition_of(ops.pairwise_log_prob)
mixture_log_prob = definition_of(ops.mixture_log_prob)
multinomial_log_prob = definition_of(ops.multinomial_log_prob)
colour_mixture_log_prob = definition_of(ops.colour_mixture_log_prob)
colour_mixture_nll_loss = definition_of(ops.colour_mixture_nll_loss)
multinomial_nll_loss = definition_of(ops.multinomial_nll_loss)


def aggregate_log_prob(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See `fastvae.aggregate_log_prob`."""
    with backend.use_backend("reference"):
        return ops.aggregate_log_prob(*args, **kwargs)
