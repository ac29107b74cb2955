"""Likelihoods p(x | z): what a decoder's output means.

Every likelihood is a module with the same three methods. It reads its parameters from the decoder's
output, which has `outputs` numbers for each element of x: its dimension 1 is `outputs` times as
long as x's, as if the parameters were concatenated along it. What a likelihood learns itself (a
sigma) is trained with the rest of the model.
"""

from .base import Likelihood
from .counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from .gaussian import Gaussian, HeteroscedasticGaussian, LearnedGaussian, OptimalGaussian
from .pixels import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Laplace,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Laplace",
    "LearnedGaussian",
    "Likelihood",
    "NegativeBinomial",
    "OptimalGaussian",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
]
