"""In what form the scale of a Gaussian, its second argument, is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import TensorLike, check_param, gaussians
from .bounds import Bound, Raised
from .elements import computed_in, log_sigma, of_log_sigma

__all__ = ["log_sigma_of", "read_gaussians", "scale_form"]


def scale_form(
    param: str, bound: Bound | Raised | None, min_std: float
) -> tuple[str, Bound | Raised | None]:
    """How the kernels read a Gaussian's second argument, of sigma = f(s) + `min_std`: by `param`,
    after what is done to it.

    Raises:
        TypeError: `bound` is no `Bound`.
        ValueError: `min_std` is not finite or below 0; an unknown `param`; a bound of what is no
            log-variance.
    """
    if param != "softplus" and min_std == 0:
        return param, bound
    if not 0 <= min_std < math.inf:
        raise ValueError(f"min_std is {min_std}; want a finite number, at least 0")
    if param != "softplus":
        check_param(param)
    if bound is not None:
        given = f"min_std is {min_std}" if param == "logvar" else f"param is {param!r}"
        raise ValueError(f"bound is given and {given}; want one of the two")
    return "log_std", Raised(param, float(min_std))


def log_sigma_of(s: Tensor, param: str, min_std: float) -> Tensor:
    """ln(f(s) + `min_std`) of a Gaussian's second argument, float32 for half types."""
    form, raised = scale_form(param, None, min_std)
    check_param(form)
    return raised(computed_in(s)) if isinstance(raised, Raised) else log_sigma(s, form)


def read_gaussians(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None,
    prior_logvar: TensorLike | None,
    param: str,
    prior_param: str | None,
    min_std: float,
    bound: Bound | Raised | None,
) -> tuple[Sequence[Tensor | None], torch.Size, str, Bound | Raised | None]:
    """The operands (q, p) and their common shape; how the kernels read both scales, as
    `scale_form` says. That of p, if it is given in another form, is made what they read."""
    form, bound = scale_form(param, bound, min_std)
    operands, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    scale, prior_param = operands[3], prior_param or param
    if scale is None or (prior_param == form and min_std == 0):
        return operands, shape, form, bound
    h = log_sigma_of(scale, prior_param, min_std)
    operands = (*operands[:3], of_log_sigma(h, form).to(scale.dtype))
    return operands, shape, form, bound
