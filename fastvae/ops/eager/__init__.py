"""What eager formulas are made of, as nodes of autograd's graph, in plain PyTorch.

For ordinary tensors. Autograd by itself would make a node of every operation, in more passes over
memory, and would find the derivative of e^t - 1 - t by subtraction. A backward pass that is itself
recorded computes what it needs of the intermediate results once more, or goes through the op's
definition.

On a CPU `torch.where` takes twice as long as a logarithm: what reads or writes `bool` is not
vectorized. So cases are told apart by factors of 0 and 1: comparisons written as numbers, `clamp`,
`hardshrink`.
"""

from .categoricals import balanced_categorical_kl, multinomial
from .counts import negative_binomial, poisson, sizes, zero_inflated
from .gaussian import gaussian_log_prob, kl, not_negative, sample_and_kl, standard_kl
from .pixels import discretized_logistic
from .weights import counting, weighted

__all__ = [
    "balanced_categorical_kl",
    "counting",
    "discretized_logistic",
    "gaussian_log_prob",
    "kl",
    "multinomial",
    "negative_binomial",
    "not_negative",
    "poisson",
    "sample_and_kl",
    "sizes",
    "standard_kl",
    "weighted",
    "zero_inflated",
]
