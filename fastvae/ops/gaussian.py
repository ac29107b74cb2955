"""The fused ops of Gaussian latents: sampling, and KL divergence or log-ratio with it.

All values are in nats. In every op:

- The last `event_ndim` dimensions are one event and are summed, as in
  `torch.distributions.Independent`; by default all but the first; 0 gives elementwise values. Sums
  of half types are float32.
- `param` says what the second argument of a Gaussian is: "logvar" (ln sigma^2), "log_std", "std",
  "var", or "softplus", of which sigma is ln(1 + e^s). `min_std` is added to sigma. A prior's is
  `prior_param`, the same by default; of what differs, or has a `min_std`, PyTorch makes what the
  kernel reads.
- `bound`, with `param="logvar"`: lv = `bound(logvar)` takes the place of `logvar`, in values and
  gradients and in the same pass (see `Bound`). It is q's, or the likelihood's; a prior's
  log-variance is taken as it is.
- Tensors are float32, float64, bfloat16 or float16, of one dtype and device, and broadcast against
  each other; Python numbers and 0-d tensors do too. Arithmetic is float32 (float64 for float64).
  Under `torch.autocast` dtypes may differ, and the widest is taken; samples have that dtype.
- Rows that are contiguous pieces (halves of a `chunk`, channels_last, expanded dimensions) are read
  in place.
- `seed` is an int64 tensor on the input's device, 0-d or one for each index along dimension 0, or
  an int; by default it is drawn from `generator` or PyTorch's own. A list of generators, one for
  each index along dimension 0, gives each row noise that does not depend on the others; a generator
  of another device, such as the CPU's, is drawn from there. One seed gives the same noise on every
  device, instruction set and number of threads. Inside `torch.compile(fullgraph=True)` no
  generator can be given: pass `seed=draw_seed(generator)`, drawn outside.
- Wrong dtypes raise TypeError, wrong shapes, devices and names ValueError. Values are not checked:
  a negative std gives NaN.

The definition above each op computes the same in plain PyTorch, under `use_backend("reference")`.
Where there are no kernels for a tensor's device, the eager formula below it does, if it has one.
There noise is PyTorch's own unless `seed`, or a list of generators, is given, and numbers beyond
float32's range, such as e^100, may make a value infinite sooner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import eager
from .arguments import (
    TensorLike,
    check_bound,
    check_param,
    check_sample_shape,
    event_dims,
    tensor_arguments,
    weight_argument,
)
from .bounds import Bound, Raised
from .declare import declare
from .elements import (
    log_sigma,
    log_variance,
    precision,
    sigma,
    standardize,
)
from .forms import read_gaussians, scale_form
from .noise import Generators, make_seed
from .op import Request

__all__ = [
    "kl_divergence",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
]


# ---- Sampling ------------------------------------------------------------------------------------


def _sample(mu: Tensor, logvar: Tensor, *, eps: Tensor, param: str) -> Tensor:
    """z = mu + sigma eps"""
    return mu + sigma(logvar, param) * eps


def _sample_eager(mu: Tensor, logvar: Tensor, *, eps: Tensor, param: str) -> Tensor:
    if param in ("std", "sigma"):
        return mu + (eager.not_negative(logvar) if param == "std" else logvar) * eps
    return _sample(mu, logvar, eps=eps, param=param)


@declare(_sample, eager=_sample_eager)
def rsample(
    mu: TensorLike,
    logvar: TensorLike,
    *,
    param: str = "logvar",
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    sample_shape: Sequence[int] = (),
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> Request:
    """Draws z = mu + sigma eps, eps ~ N(0, I), differentiably (Kingma & Welling 2014, section 2.4).

    Args:
        mu, logvar: the Gaussian; see the module's documentation for `param` and `bound`.
        sample_shape: dimensions put in front, one independent sample each. More samples extend the
            noise and never change the first ones.
        seed, generator: where the noise comes from; at most one of them.

    Returns:
        z of shape `sample_shape + mu.shape` and of mu's dtype.

    Example:
        >>> z = fastvae.rsample(torch.zeros(128, 20), torch.zeros(128, 20))
    """
    form, bound = scale_form(param, bound, min_std)
    operands, shape = tensor_arguments(mu=mu, logvar=logvar)
    return operands, {
        "seed": make_seed(seed, generator, operands[0], shape),
        "param": check_param(form),
        "packed_dim": -1,
        "sample_shape": check_sample_shape(sample_shape),
        "bound": check_bound(bound, form),
    }


# ---- KL divergence -------------------------------------------------------------------------------


def _exp_tail(t: Tensor) -> Tensor:
    """e^t - 1 - t, to full relative precision near 0."""
    r = t.clamp(-0.5, 0.5)
    series = torch.zeros_like(r)
    for k in range(16, 1, -1):  # 1/2! + r/3! + ... + r^14/16!, by Horner's rule
        series = series * r + 1 / math.factorial(k)
    upper = t.clamp(max=torch.finfo(t.dtype).max)  # inf - inf is not meant
    return torch.where(t.abs() < 0.5, r * r * series, torch.expm1(t) - upper)


def _kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    param: str,
) -> Tensor:
    """1/2 (e^{2d} - 1 - 2d + w^2), d = h_q - h_p, w = (mu_q - mu_p) / sigma_p"""
    if prior_mu is None or prior_logvar is None:
        return 0.5 * (mu * mu + _exp_tail(2 * log_sigma(logvar, param)))
    log_sigma_p = log_sigma(prior_logvar, param)
    w = standardize(mu - prior_mu, log_sigma_p)
    return 0.5 * (_exp_tail(2 * (log_sigma(logvar, param) - log_sigma_p)) + w * w)


def _kl_eager(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    param: str,
    event: torch.Size,
) -> Tensor:
    lv = log_variance(logvar, param)
    if prior_mu is None or prior_logvar is None:
        return eager.standard_kl(mu, lv, len(event))
    prior_lv = log_variance(prior_logvar, param)
    if mu.shape == lv.shape == prior_mu.shape == prior_lv.shape:
        return eager.kl(partial(_kl, param="logvar"), mu, lv, prior_mu, prior_lv, len(event))
    # To N(0, I) of the latents in units of p's scale.
    w = (mu - prior_mu) * precision(log_sigma(prior_logvar, param))
    return eager.standard_kl(w, lv - prior_lv, len(event))


@declare(_kl, eager=_kl_eager)
def kl_divergence(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    prior_param: str | None = None,
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """KL(q || p) between diagonal Gaussians, p = N(0, I) unless given.

    With lv = ln sigma^2, d = lv_q - lv_p, the sum over an event of

        1/2 (mu^2 + (e^lv - 1 - lv))                          to N(0, I)
        1/2 ((e^d - 1 - d) + (mu_q - mu_p)^2 e^{-lv_p})       to N(mu_p, e^{lv_p})

    Relative accuracy holds through posterior collapse (q -> p), and the result is never negative.

    Args:
        mu, logvar: q; `bound` is of its log-variance.
        prior_mu, prior_logvar: p, both or neither; read by `prior_param`, by default as q.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: multiplies each element before the sum: a mask, or a number for each; it broadcasts
            to the operands and is a constant. What weighs 0 is left out, even if it is NaN.

    Returns:
        Nats, of shape `mu.shape[:-event_ndim]`.
    """
    operands, shape, form, bound = read_gaussians(
        mu, logvar, prior_mu, prior_logvar, param, prior_param, min_std, bound
    )
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "param": check_param(form),
        "packed_dim": -1,
        "event_ndim": event_dims(event_ndim, len(shape)),
        "bound": check_bound(bound, form),
    }


# ---- Sampling with KL, or with the log-ratio, in one pass ----------------------------------------


def _sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    eps: Tensor,
    param: str,
) -> tuple[Tensor, Tensor]:
    z = _sample(mu, logvar, eps=eps, param=param)
    return z, _kl(mu, logvar, prior_mu, prior_logvar, param=param)


def _sample_and_kl_eager(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    eps: Tensor,
    param: str,
    event: torch.Size,
) -> tuple[Tensor, Tensor]:
    if param == "logvar" and prior_mu is None and mu.shape == logvar.shape == eps.shape:
        return eager.sample_and_kl(mu, logvar, eps, len(event))
    z = _sample_eager(mu, logvar, eps=eps, param=param)
    return z, _kl_eager(mu, logvar, prior_mu, prior_logvar, param=param, event=event)


@declare(_sample_and_kl, eager=_sample_and_kl_eager)
def rsample_kl(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    prior_param: str | None = None,
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> Request:
    """`rsample(mu, logvar)` and `kl_divergence(mu, logvar, prior_mu, prior_logvar)` in one pass.

    The whole of what stands between encoder and decoder: two tensors are read and one is written,
    and backward draws the noise again instead of having stored it. `weight` is of the divergence,
    as there; z is drawn everywhere.

    Returns:
        z of q's broadcast shape and dtype, and the KL divergence in nats.

    Example:
        >>> z, kl = fastvae.rsample_kl(*encoder(x).chunk(2, dim=1))
        >>> loss = (kl - fastvae.gaussian_log_prob(x, decoder(z))).mean()
    """
    operands, shape, form, bound = read_gaussians(
        mu, logvar, prior_mu, prior_logvar, param, prior_param, min_std, bound
    )
    return operands, {
        "seed": make_seed(seed, generator, operands[0], shape),
        "weight": weight_argument(weight, operands[0], shape),
        "param": check_param(form),
        "packed_dim": -1,
        "event_ndim": event_dims(event_ndim, len(shape)),
        "bound": check_bound(bound, form),
    }


def _sample_and_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    eps: Tensor,
    param: str,
    path_derivative: bool,
) -> tuple[Tensor, Tensor]:
    """ln p(z) - ln q(z) = h_q - h_p + 1/2 (eps^2 - w^2), w = (z - mu_p) / sigma_p"""
    h, step = log_sigma(logvar, param), sigma(logvar, param) * eps
    z = mu + step
    if prior_mu is None or prior_logvar is None:
        h_p, w = torch.zeros_like(h), z
    else:
        h_p = log_sigma(prior_logvar, param)
        w = standardize(mu - prior_mu + step, h_p)
    if path_derivative:  # (z - mu) / sigma of a z that moves, while mu and sigma do not
        h = h.detach()
        eps = eps + standardize(z - z.detach(), h)
    # A tensor of its own: as with the op, no gradient of the ratio passes through the z returned.
    return z.view_as(z), h - h_p + 0.5 * (eps - w) * (eps + w)


@declare(_sample_and_log_ratio)
def rsample_log_ratio(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    prior_param: str | None = None,
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    sample_shape: Sequence[int] = (),
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
    path_derivative: bool = False,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> Request:
    """z ~ q and ln p(z) - ln q(z) in one pass, p = N(0, I) unless given: the latent part of the
    log-weights of importance sampling and of the IWAE (Burda, Grosse & Salakhutdinov 2016), and
    minus a sample of KL(q || p).

    With z = mu + sigma eps and h = ln sigma, the sum over an event of

        h_q - h_p + 1/2 (eps^2 - ((z - mu_p) / sigma_p)^2)

    Args:
        mu, logvar: q; `bound` is of its log-variance.
        prior_mu, prior_logvar: p, both or neither; read by `prior_param`, by default as q.
        sample_shape: dimensions put in front, as in `rsample`: K samples are `(K,)`.
        event_ndim: how many trailing dimensions of q are summed; default all but the first.
        path_derivative: in the gradient, take q's parameters in ln q(z) as constants, so that it
            reaches them through z alone (Roeder, Wu & Duvenaud 2017). Values do not change. What
            is left out, the score, has mean 0.
        weight: of the elements of the log-ratio, as in `kl_divergence`.
        seed, generator: where the noise comes from; at most one of them.

    Returns:
        z of shape `sample_shape + mu.shape` and of q's dtype, the one of `rsample`; and nats, of
        shape `sample_shape + mu.shape[:-event_ndim]`, of z as it was before its rounding to a half
        type.

    Example:
        >>> z, log_ratio = fastvae.rsample_log_ratio(mu, logvar, sample_shape=(50,))
        >>> log_w = log_ratio + fastvae.gaussian_log_prob(x, decoder(z), event_ndim=1)
        >>> loss = -log_w.logsumexp(0).mean()
    """
    operands, shape, form, bound = read_gaussians(
        mu, logvar, prior_mu, prior_logvar, param, prior_param, min_std, bound
    )
    return operands, {
        "seed": make_seed(seed, generator, operands[0], shape),
        "weight": weight_argument(weight, operands[0], shape),
        "param": check_param(form),
        "packed_dim": -1,
        "event_ndim": event_dims(event_ndim, len(shape)),
        "sample_shape": check_sample_shape(sample_shape),
        "path_derivative": bool(path_derivative),
        "bound": check_bound(bound, form),
    }
