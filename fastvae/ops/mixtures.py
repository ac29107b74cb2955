"""Rows against components: all pairs, mixtures of Gaussians, and the aggregate posterior.

Values are nats. Components are diagonal Gaussians, mu and logvar of shape [components, *event], and
z has any shape that ends in an event; none is copied for the others, and no tensor of rows x
components x dimensions is ever made: memory is for the components once more and for one number a
component and thread, in the backward pass too. `param` and `bound` say how logvar is read, as in
`fastvae.rsample`. Dtypes promote, half types are computed in float32, and so are the values.

Logarithms of densities are summed in double where many dimensions add up, for an error of theirs
is one of the weights. A component that weighs less than 10^-26 of its sum (float64: 10^-130) has a
gradient of 0, and a sigma below 2 10^-19 counts as that in the distance to z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arguments import PARAMS, TensorLike, check_bound, check_param, event_dims, tensor_arguments
from .bounds import Bound, Raised
from .declare import declare
from .elements import computed_in, log_variance, precision
from .forms import scale_form
from .op import OPS, Request
from .reals import _log_prob

__all__ = ["aggregate_log_prob", "mixture_log_prob", "pairwise_log_prob"]


def _pairs(
    z: Tensor,
    mu: TensorLike,
    logvar: TensorLike,
    log_weights: Tensor | None,
    param: str,
    bound: Bound | Raised | None,
    event_ndim: int | None,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The operands z [..., D], mu and logvar [K, D] and log_weights [K], and the settings that all
    ops have."""
    if not isinstance(z, Tensor):
        raise TypeError(f"z is a {type(z).__name__}; want a tensor")
    of_components, shape = tensor_arguments(mu=mu, logvar=logvar)
    if not shape:
        raise ValueError("mu and logvar have no dimension; want [components, *event]")
    n = event_dims(event_ndim, len(shape))
    if n != len(shape) - 1:
        raise ValueError(
            f"mu and logvar have shape {list(shape)} and event_ndim is {n}; want one dimension, of "
            "the components, before the event"
        )
    if shape[0] == 0:
        raise ValueError(f"mu and logvar have shape {list(shape)}; want at least one component")
    if z.dim() < n or z.shape[z.dim() - n :] != shape[1:]:
        raise ValueError(f"z has shape {list(z.shape)}; want [..., {str([*shape[1:]])[1:-1]}]")
    given: dict[str, TensorLike] = {
        "z": z.unsqueeze(z.dim() - n),
        "mu": of_components[0],
        "logvar": of_components[1],
    }
    if log_weights is not None:
        if not isinstance(log_weights, Tensor):
            raise TypeError(f"log_weights is a {type(log_weights).__name__}; want a tensor or None")
        if log_weights.shape != shape[:1]:
            raise ValueError(
                f"log_weights has shape {list(log_weights.shape)}; want [{shape[0]}], one for each "
                "component"
            )
        given["log_weights"] = log_weights.reshape(-1, *(1,) * n)
    param, bound = scale_form(param, bound, 0.0)
    check_bound(bound, param)
    code = check_param(param)
    z, *of_components = map(computed_in, tensor_arguments(**given)[0])
    if bound is not None:
        of_components[1] = bound(of_components[1])
    size = math.prod(shape[1:])
    operands: list[Tensor | None] = [z.reshape(*z.shape[: z.dim() - n - 1], size)]
    operands += [t.expand(shape).reshape(shape[0], size) for t in of_components[:2]]
    if log_weights is not None:
        operands.append(of_components[2].reshape(-1))
    return operands, {"param": code}


def _elements(z: Tensor, mu: Tensor, logvar: Tensor, param: str) -> Tensor:
    return _log_prob(z.unsqueeze(-2), mu, logvar, param=param)


# ---- All pairs -----------------------------------------------------------------------------------


def _pairwise(z: Tensor, mu: Tensor, logvar: Tensor, *, param: str) -> Tensor:
    return _elements(z, mu, logvar, param).sum(-1)


def _pairwise_eager(z: Tensor, mu: Tensor, logvar: Tensor, *, param: str) -> Tensor:
    w, normalizer = _standardized(z, mu, logvar, param)
    return torch.sub(normalizer.sum(-1), torch.linalg.vecdot(w, w), alpha=0.5)


def _elements_eager(z: Tensor, mu: Tensor, logvar: Tensor, param: str) -> Tensor:
    w, normalizer = _standardized(z, mu, logvar, param)
    return torch.addcmul(normalizer, w, w, value=-0.5)


def _standardized(z: Tensor, mu: Tensor, logvar: Tensor, param: str) -> tuple[Tensor, Tensor]:
    """(z - mu) / sigma of all pairs, and -ln sigma - 1/2 ln 2 pi of the components."""
    lv = log_variance(logvar, param)
    normalizer = torch.rsub(lv, -0.5 * math.log(2 * math.pi), alpha=0.5)
    return (z.unsqueeze(-2) - mu) * precision(0.5 * lv), normalizer


@declare(_pairwise, eager=_pairwise_eager, whole=True)
def pairwise_log_prob(
    z: Tensor,
    mu: TensorLike,
    logvar: TensorLike,
    *,
    param: str = "logvar",
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
) -> Request:
    """ln N(z_b; mu_k, sigma_k^2), of each z with each component.

    With weights, softmax(pairs + ln w) are the components' responsibilities p(k | z), and the
    logsumexp is `mixture_log_prob`.

    Args:
        z: [..., *event].
        mu, logvar: [components, *event], or what broadcasts to that.
        event_ndim: dimensions of an event; default all but the first of the components.

    Returns:
        Nats, [..., components]; float32 for half types.

    Raises:
        TypeError, ValueError: as `fastvae.rsample`, and where z or the components have other
            shapes.
    """
    return _pairs(z, mu, logvar, None, param, bound, event_ndim)


# ---- Mixtures ------------------------------------------------------------------------------------


def _mixture(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    *,
    param: str,
    marginals: bool,
    log_own: float,
    log_other: float,
    pairwise: Callable[..., Tensor] = _pairwise,
    elements: Callable[..., Tensor] = _elements,
) -> Tensor:
    """ln sum_k w_k N(z; mu_k, sigma_k^2), or that of each dimension by itself, summed"""
    if marginals:
        pairs = elements(z, mu, logvar, param=param)
    else:
        pairs = pairwise(z, mu, logvar, param=param).unsqueeze(-1)
    return _mixed(pairs, log_weights, log_own, log_other)


_mixture_eager = partial(_mixture, pairwise=_pairwise_eager, elements=_elements_eager)


def _mixed(pairs: Tensor, log_weights: Tensor | None, log_own: float, log_other: float) -> Tensor:
    """Over the components, of pairs [..., K, D or 1], summed over the rest."""
    rows, components = pairs.shape[0], pairs.shape[-2]
    weights = torch.full((components,), log_other, dtype=pairs.dtype, device=pairs.device)
    weights = weights if log_weights is None else weights + log_weights
    if log_own != log_other:
        weights = weights + (log_own - log_other) * torch.eye(
            rows, components, dtype=pairs.dtype, device=pairs.device
        )
    return torch.logsumexp(pairs + weights.unsqueeze(-1), -2).sum(-1)


@declare(_mixture, eager=_mixture_eager, whole=True)
def mixture_log_prob(
    z: Tensor,
    mu: TensorLike,
    logvar: TensorLike,
    log_weights: Tensor | None = None,
    *,
    param: str = "logvar",
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
) -> Request:
    """ln sum_k w_k N(z; mu_k, sigma_k^2).

    Args:
        z: [..., *event].
        mu, logvar: [components, *event], or what broadcasts to that.
        log_weights: ln w, [components], normalized or not; default 1 / components each.
        event_ndim: dimensions of an event; default all but the first of the components.

    Returns:
        Nats, of z's shape without the event; float32 for half types. Minus infinity where all
        weights are 0.

    Raises:
        TypeError, ValueError: as `fastvae.rsample`, and where z, the components or their weights
            have other shapes.

    Example:
        >>> log_w = torch.log_softmax(logits, 0)
        >>> log_p = fastvae.mixture_log_prob(z, prior_mu, prior_logvar, log_w)
    """
    operands, settings = _pairs(z, mu, logvar, log_weights, param, bound, event_ndim)
    if log_weights is None:
        equal = -math.log(operands[1].shape[0])  # type: ignore[union-attr]
        return [*operands, None], settings | _weights(equal, equal)
    return operands, settings | _weights(0.0, 0.0)


def _weights(log_own: float, log_other: float, *, marginals: bool = False) -> dict[str, Any]:
    return {"marginals": marginals, "log_own": log_own, "log_other": log_other}


# ---- The aggregate posterior ---------------------------------------------------------------------


def aggregate_log_prob(
    z: Tensor,
    mu: TensorLike,
    logvar: TensorLike,
    *,
    dataset_size: int | None = None,
    estimator: str = "mss",
    param: str = "logvar",
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """ln q(z) and sum_d ln q(z_d) of the aggregate posterior q(z) = 1/N sum_n q(z | x_n), estimated
    from a batch of B of the N examples: z_b is of q(z | x_b), row b of mu and logvar.

    - "mss", minibatch stratified sampling (Chen et al. 2018, "Isolating sources of disentanglement
      in VAEs", appendix C): q(z_b) as 1/N q(z_b | x_b) + (N - 1) / (N (B - 1)) times the sum over
      the others. That is the paper's estimator averaged over which of the others is its last one:
      unbiased as it is, of smaller variance; exact for B = N.
    - "mws", minibatch weighted sampling: 1 / (N B) times the sum over all. Its q(z) is too small,
      by about the logarithm of B for z apart from each other.

    The logarithm of an unbiased estimate is still biased, downwards.

    Args:
        z, mu, logvar: [B, *event].
        dataset_size: N, at least B; default B, the batch being all there is.
        estimator: "mss" or "mws".

    Returns:
        Two tensors of B nats; float32 for half types. The total correlation is the mean of their
        difference.

    Raises:
        TypeError, ValueError: as `fastvae.mixture_log_prob`; a `dataset_size` below B, an unknown
            `estimator`, z that is not one for each component, or one example of many.
    """
    if estimator not in ("mss", "mws"):
        raise ValueError(f"estimator is {estimator!r}; want 'mss' or 'mws'")
    operands, settings = _pairs(z, mu, logvar, None, param, bound, event_ndim)
    rows, components = operands[0], operands[1]
    assert rows is not None
    assert components is not None
    batch = len(components)
    if rows.shape != components.shape:
        raise ValueError(f"z has shape {list(z.shape)}; want one z for each of {batch} components")
    size = batch if dataset_size is None else dataset_size
    if size < batch:
        raise ValueError(f"dataset_size is {size}; want at least the batch's {batch}")
    if estimator == "mws":
        log_own = log_other = -math.log(size * batch)
    elif batch == 1 and size > 1:
        raise ValueError(f"one example of {size} says nothing of the others; want two at least")
    else:
        log_own = -math.log(size)
        log_other = log_own + math.log((size - 1) / (batch - 1)) if batch > 1 else log_own
    mixture = OPS["mixture_log_prob"]
    if mixture.path(rows) == "eager":  # whose tensor of all pairs serves both
        assert operands[2] is not None
        pairs = _elements_eager(rows, components, operands[2], PARAMS[settings["param"]])
        joint = _mixed(pairs.sum(-1, keepdim=True), None, log_own, log_other)
        return joint, _mixed(pairs, None, log_own, log_other)
    operands = [*operands, None]
    joint = mixture.run(operands, settings | _weights(log_own, log_other))
    return joint, mixture.run(operands, settings | _weights(log_own, log_other, marginals=True))
