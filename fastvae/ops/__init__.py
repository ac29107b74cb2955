"""The ops: one module a family, in which each is read from top to bottom."""

from .balanced import balanced_kl_divergence
from .bounds import Bound
from .categoricals import balanced_categorical_kl_divergence, straight_through_categorical
from .colours import colour_mixture_log_prob, colour_mixture_nll_loss
from .counts import (
    negative_binomial_log_prob,
    negative_binomial_nll_loss,
    poisson_log_prob,
    poisson_nll_loss,
    zero_inflated_negative_binomial_log_prob,
    zero_inflated_negative_binomial_nll_loss,
)
from .gaussian import (
    kl_divergence,
    rsample,
    rsample_kl,
    rsample_log_ratio,
)
from .items import (
    categorical_log_prob,
    categorical_nll_loss,
    multinomial_log_prob,
    multinomial_nll_loss,
)
from .mixtures import aggregate_log_prob, mixture_log_prob, pairwise_log_prob
from .noise import draw_seed
from .op import has_kernels
from .pixels import (
    bernoulli_log_prob,
    bernoulli_nll_loss,
    continuous_bernoulli_log_prob,
    continuous_bernoulli_nll_loss,
    discretized_logistic_log_prob,
    discretized_logistic_mixture_log_prob,
    discretized_logistic_mixture_nll_loss,
    discretized_logistic_nll_loss,
    laplace_log_prob,
    laplace_nll_loss,
)
from .reals import gaussian_log_prob, gaussian_nll_loss

__all__ = [
    "Bound",
    "aggregate_log_prob",
    "balanced_categorical_kl_divergence",
    "balanced_kl_divergence",
    "bernoulli_log_prob",
    "bernoulli_nll_loss",
    "categorical_log_prob",
    "categorical_nll_loss",
    "colour_mixture_log_prob",
    "colour_mixture_nll_loss",
    "continuous_bernoulli_log_prob",
    "continuous_bernoulli_nll_loss",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "discretized_logistic_mixture_nll_loss",
    "discretized_logistic_nll_loss",
    "draw_seed",
    "gaussian_log_prob",
    "gaussian_nll_loss",
    "has_kernels",
    "kl_divergence",
    "laplace_log_prob",
    "laplace_nll_loss",
    "mixture_log_prob",
    "multinomial_log_prob",
    "multinomial_nll_loss",
    "negative_binomial_log_prob",
    "negative_binomial_nll_loss",
    "pairwise_log_prob",
    "poisson_log_prob",
    "poisson_nll_loss",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
    "straight_through_categorical",
    "zero_inflated_negative_binomial_log_prob",
    "zero_inflated_negative_binomial_nll_loss",
]
