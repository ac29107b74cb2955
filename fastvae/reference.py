"""The definition of the package in plain PyTorch.

The same names as the fused ops, the same noise from the same seed, differentiable any number of
times, on any device. The tests hold the kernels to it, and it computes where there are no kernels.

With lv = ln sigma^2, element by element and then summed over the last `event_ndim` dimensions:

- z = mu + e^{lv/2} eps
- KL(q || N(0, I)) = 1/2 (mu^2 + (e^lv - 1 - lv))
- KL(q || p) = 1/2 ((e^d - 1 - d) + (mu_q - mu_p)^2 e^{-lv_p}),  d = lv_q - lv_p
- ln p(z) - ln q(z) = 1/2 (lv_q - lv_p + eps^2 - (z - mu_p)^2 e^{-lv_p})
- log N(x; m, e^lv) = -1/2 ((x - m)^2 e^{-lv} + lv + ln 2 pi)

With a `bound`, lv of q and of the likelihood is what `Bound.__call__` gives.

The noise is Philox4x32-10 (Salmon et al. 2011): key = the seed, counter = {column / 4, row low,
row high, sample}; four words give the normals of four columns as two Box-Muller pairs. A row is an
index along dimension 0, a column the C-order index inside its row, a sample the flat index in
`sample_shape`. With one seed a row, the key is the row's own and the row words are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import (
    TensorLike,
    check_bound,
    check_param,
    check_reduction,
    check_sample_shape,
    event_dims,
    gaussian_arguments,
    gaussians,
    make_seed,
)
from ._formulas import computed_in, event_sum, standardize
from .bounds import Bound
from .pixel_reference import (
    bernoulli_log_prob,
    continuous_bernoulli_log_prob,
    discretized_logistic_log_prob,
    laplace_log_prob,
)

__all__ = [
    "bernoulli_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "gaussian_log_prob",
    "gaussian_nll_loss",
    "kl_divergence",
    "laplace_log_prob",
    "log_sigma",
    "noise",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
    "sigma",
]


def rsample(
    mu: TensorLike,
    logvar: TensorLike,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    sample_shape: Sequence[int] = (),
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """See `fastvae.rsample`."""
    check_param(param)
    check_bound(bound, param)
    (mu, logvar), shape = gaussian_arguments(mu=mu, logvar=logvar)
    sample_shape = check_sample_shape(sample_shape)
    seed = make_seed(seed, generator, mu.device, shape[0] if shape else None)
    return _sample(mu, _bounded(logvar, bound), shape, param, sample_shape, seed)


def kl_divergence(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    event_ndim: int | None = None,
) -> Tensor:
    """See `fastvae.kl_divergence`."""
    check_param(param)
    check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    tensors[1] = _bounded(tensors[1], bound)
    return event_sum(_kl(tensors, param), shape, event_ndim)


def rsample_kl(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    event_ndim: int | None = None,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastvae.rsample_kl`."""
    check_param(param)
    check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    seed = make_seed(seed, generator, tensors[0].device, shape[0] if shape else None)
    tensors[1] = _bounded(tensors[1], bound)
    kl = event_sum(_kl(tensors, param), shape, event_ndim)
    return _sample(tensors[0], tensors[1], shape, param, (), seed), kl


def rsample_log_ratio(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None = None,
    prior_logvar: TensorLike | None = None,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    sample_shape: Sequence[int] = (),
    event_ndim: int | None = None,
    path_derivative: bool = False,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastvae.rsample_log_ratio`."""
    check_param(param)
    check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    dims = event_dims(event_ndim, len(shape))
    sample_shape = check_sample_shape(sample_shape)
    seed = make_seed(seed, generator, tensors[0].device, shape[0] if shape else None)
    tensors[1] = _bounded(tensors[1], bound)
    z, log_ratio = _log_ratio(tensors, shape, param, sample_shape, seed, path_derivative)
    # A tensor of its own: as with the op, no gradient of the ratio passes through the z returned.
    z = z.view_as(z).to(tensors[0].dtype)
    return z, event_sum(log_ratio, sample_shape + shape, dims)


def gaussian_log_prob(
    x: TensorLike,
    mean: TensorLike,
    logvar: TensorLike = 0.0,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    event_ndim: int | None = None,
) -> Tensor:
    """See `fastvae.gaussian_log_prob`."""
    check_param(param)
    check_bound(bound, param)
    if isinstance(logvar, int | float):  # a number is not rounded to a half type
        (x, mean), shape = gaussian_arguments(x=x, mean=mean)
        logvar = torch.full((), logvar, dtype=computed_in(x).dtype, device=x.device)
    else:
        (x, mean, logvar), shape = gaussian_arguments(x=x, mean=mean, logvar=logvar)
    h = log_sigma(_bounded(logvar, bound), param)
    w = standardize(computed_in(x) - computed_in(mean), h)
    log_prob = -0.5 * w * w - h - 0.5 * math.log(2 * math.pi)
    return event_sum(log_prob, shape, event_ndim)


def gaussian_nll_loss(
    x: TensorLike,
    mean: TensorLike,
    logvar: TensorLike = 0.0,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    event_ndim: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See `fastvae.gaussian_nll_loss`."""
    check_reduction(reduction)
    log_prob = gaussian_log_prob(x, mean, logvar, param=param, bound=bound, event_ndim=event_ndim)
    return -reduce(log_prob, reduction)


def reduce(values: Tensor, reduction: str) -> Tensor:
    """The mean or sum of all values."""
    return values.mean() if reduction == "mean" else values.sum()


# ---- Formulas -----------------------------------------------------------------------------------


def _bounded(logvar: Tensor, bound: Bound | None) -> Tensor:
    return logvar if bound is None else bound(computed_in(logvar))


def log_sigma(s: Tensor, param: str) -> Tensor:
    """ln sigma of a Gaussian's second argument, float32 for half types."""
    s = computed_in(s)
    if param == "logvar":
        return 0.5 * s
    if param == "log_std":
        return s
    return torch.log(s) * (0.5 if param == "var" else 1.0)


def sigma(s: Tensor, param: str) -> Tensor:
    """sigma of a Gaussian's second argument, float32 for half types; NaN below 0."""
    s = computed_in(s)
    if param == "std":
        return torch.where(s < 0, math.nan, s)  # as its logarithm is
    return torch.sqrt(s) if param == "var" else torch.exp(log_sigma(s, param))


def _exp_tail(t: Tensor) -> Tensor:
    """e^t - 1 - t, to full relative precision near 0."""
    r = t.clamp(-0.5, 0.5)
    series = torch.zeros_like(r)
    for k in range(16, 1, -1):  # 1/2! + r/3! + ... + r^14/16!, by Horner's rule
        series = series * r + 1 / math.factorial(k)
    upper = t.clamp(max=torch.finfo(t.dtype).max)  # inf - inf is not meant
    return torch.where(t.abs() < 0.5, r * r * series, torch.expm1(t) - upper)


def _kl(tensors: list[Tensor], param: str) -> Tensor:
    mu, logvar, *prior = (computed_in(t) for t in tensors)
    if not prior:
        return 0.5 * (mu * mu + _exp_tail(2 * log_sigma(logvar, param)))
    prior_mu, prior_logvar = prior
    log_sigma_p = log_sigma(prior_logvar, param)
    w = standardize(mu - prior_mu, log_sigma_p)
    return 0.5 * (_exp_tail(2 * (log_sigma(logvar, param) - log_sigma_p)) + w * w)


def _log_ratio(
    tensors: list[Tensor],
    shape: torch.Size,
    param: str,
    sample_shape: Sequence[int],
    seed: Tensor,
    path_derivative: bool,
) -> tuple[Tensor, Tensor]:
    mu, logvar, *prior = (computed_in(t) for t in tensors)
    h = log_sigma(logvar, param)
    eps, step = _steps(logvar, shape, param, sample_shape, seed)
    z = mu + step
    if prior:
        h_p = log_sigma(prior[1], param)
        w = standardize(mu - prior[0] + step, h_p)
    else:
        h_p, w = torch.zeros_like(h), z
    if path_derivative:  # (z - mu) / sigma of a z that moves, while mu and sigma do not
        h = h.detach()
        eps = eps + standardize(z - z.detach(), h)
    return z, h - h_p + 0.5 * (eps - w) * (eps + w)


def _sample(
    mu: Tensor,
    logvar: Tensor,
    shape: torch.Size,
    param: str,
    sample_shape: Sequence[int],
    seed: Tensor,
) -> Tensor:
    _, step = _steps(logvar, shape, param, sample_shape, seed)
    return (computed_in(mu) + step).to(mu.dtype)


def _steps(
    logvar: Tensor, shape: torch.Size, param: str, sample_shape: Sequence[int], seed: Tensor
) -> tuple[Tensor, Tensor]:
    """eps and sigma eps."""
    scale = sigma(logvar, param)
    eps = noise(seed, shape, sample_shape=sample_shape).to(scale.dtype)
    return eps, scale * eps


# ---- Noise --------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF


def noise(seed: Tensor, shape: Sequence[int], *, sample_shape: Sequence[int] = ()) -> Tensor:
    """The standard normals, float32 of shape `sample_shape + shape`, that `seed` stands for.

    Args:
        seed: int64 on the wanted device, 0-d or one for each index along dimension 0 of `shape`.
        shape: of one sample: rows along dimension 0, columns along the others.
        sample_shape: how many samples; more samples never change the first ones.
    """
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    counts = (math.prod(sample_shape), rows, (columns + 3) // 4)
    grid = [torch.arange(n, device=seed.device) for n in counts]
    sample, row, block = torch.meshgrid(*grid, indexing="ij")
    if seed.dim() == 1:
        seed, row = seed[:, None], torch.zeros_like(row)
    counter = (block, row & _WORD, row >> 32, sample)
    words = philox(counter, seed & _WORD, (seed >> 32) & _WORD)
    normals = torch.stack([*box_muller(*words[:2]), *box_muller(*words[2:])], dim=-1)
    normals = normals.reshape(counts[0], rows, 4 * counts[2])[..., :columns]
    return normals.reshape((*sample_shape, *shape))


def philox(
    counter: Sequence[Tensor], key_low: Tensor, key_high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits, held in int64, from four words and a key of two."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        low0, high0 = _wide_multiply(c0, 0xD2511F53)
        low1, high1 = _wide_multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low = (key_low + 0x9E3779B9) & _WORD
        key_high = (key_high + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _wide_multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The product wraps into the sign bit of int64, whose bits are still those of the product.
    product = a * b
    return product & _WORD, (product >> 32) & _WORD


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) in float32, u from the words `a` and v from `b`.

    The uniforms are (word + 1/2) 2^-32, computed in float64; ln u is taken as ln(1 - (1 - u)) where
    u is nearer to 1, and the quarter of the circle is taken off the angle as integer. The kernels'
    float32 results differ from these by a few units in the last place.
    """
    near_one = a >= 2**31
    distance = (torch.where(near_one, _WORD - a, a).double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.where(near_one, torch.log1p(-distance), torch.log(distance)))
    quadrant = (b + 2**29) >> 30
    angle = ((b - (quadrant << 30)).double() + 0.5) * (math.pi * 2.0**-31)
    cos, sin = torch.cos(angle), torch.sin(angle)
    odd = quadrant % 2 == 1
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    sign = torch.where((quadrant // 2) % 2 == 1, -1.0, 1.0)
    return (radius * sign * cos).float(), (radius * sign * sin).float()
