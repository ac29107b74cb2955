"""In what form the scale of a Gaussian, its second argument, is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .arguments import check_param
from .bounds import Bound, Raised
from .elements import computed_in, log_sigma, of_log_sigma

__all__ = ["read_prior", "scale_form"]


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


def read_prior(
    operands: Sequence[Tensor | None], prior_param: str, min_std: float, form: str
) -> Sequence[Tensor | None]:
    """The operands (q, p) with p's scale, which is given by `prior_param`, as `form` wants it."""
    scale = operands[3]
    if scale is None or (prior_param == form and min_std == 0):
        return operands
    own, raised = scale_form(prior_param, None, min_std)
    check_param(own)
    s = computed_in(scale)
    h = raised(s) if isinstance(raised, Raised) else log_sigma(s, own)
    return (*operands[:3], of_log_sigma(h, form).to(scale.dtype))
