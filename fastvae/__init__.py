"""Fused kernels, and the rest of what it takes, for training variational autoencoders."""

from . import reference
from .backend import info, use_backend
from .bounds import Bound
from .cholesky import CholeskyGaussian
from .debug import NonFinite
from .distributions import DiagonalGaussian
from .functional import (
    draw_seed,
    gaussian_log_prob,
    gaussian_nll_loss,
    kl_divergence,
    rsample,
    rsample_kl,
    rsample_log_ratio,
)
from .importance import importance_sampling, log_weights, prior_sampling, rsample_log_weight
from .information import report
from .likelihoods import (
    Gaussian,
    HeteroscedasticGaussian,
    LearnedGaussian,
    Likelihood,
    OptimalGaussian,
)
from .log_probs import (
    bernoulli_log_prob,
    categorical_log_prob,
    continuous_bernoulli_log_prob,
    discretized_logistic_log_prob,
    discretized_logistic_mixture_log_prob,
    laplace_log_prob,
)
from .objectives import ELBO, IWAE, DReG, StickingTheLanding
from .penalties import Beta, Capacity, Cyclical, FreeBits, Linear
from .pixel_likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Laplace,
)
from .priors import (
    ConditionalGaussian,
    LearnedGaussianPrior,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
)
from .vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "Bernoulli",
    "Beta",
    "Bound",
    "Capacity",
    "Categorical",
    "CholeskyGaussian",
    "ConditionalGaussian",
    "ContinuousBernoulli",
    "Cyclical",
    "DReG",
    "DiagonalGaussian",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "FreeBits",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Laplace",
    "LearnedGaussian",
    "LearnedGaussianPrior",
    "Likelihood",
    "Linear",
    "MixturePrior",
    "NonFinite",
    "OptimalGaussian",
    "Prior",
    "StandardNormal",
    "StickingTheLanding",
    "VampPrior",
    "bernoulli_log_prob",
    "categorical_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "draw_seed",
    "gaussian_log_prob",
    "gaussian_nll_loss",
    "importance_sampling",
    "info",
    "kl_divergence",
    "laplace_log_prob",
    "log_weights",
    "prior_sampling",
    "reference",
    "report",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
    "rsample_log_weight",
    "use_backend",
]
