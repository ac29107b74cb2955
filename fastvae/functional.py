"""The fused ops: sampling, KL divergence or log-ratio with it, and Gaussian log-likelihood.

All values are in nats. In every op:

- The last `event_ndim` dimensions are one event and are summed, as in
  `torch.distributions.Independent`; by default all but the first; 0 gives elementwise values. Sums
  of half types are float32.
- `param` says what the second argument of a Gaussian is: "logvar" (ln sigma^2), "log_std", "std" or
  "var".
- `bound`, with `param="logvar"`: lv = `bound(logvar)` takes the place of `logvar`, in values and
  gradients and in the same pass (see `Bound`). It is q's, or the likelihood's; a prior's
  log-variance is taken as it is.
- Tensors are float32, float64, bfloat16 or float16, of one dtype and device, and broadcast against
  each other; Python numbers and 0-d tensors do too. Arithmetic is float32 (float64 for float64).
  Under `torch.autocast` dtypes may differ, and the widest is taken; samples have that dtype.
- Rows that are contiguous pieces (halves of a `chunk`, channels_last, expanded dimensions) are read
  in place.
- `seed` is an int64 tensor on the input's device, 0-d or one for each index along dimension 0, or
  an int; by default it is drawn from `generator` or PyTorch's own. One seed gives the same noise on
  every device, instruction set and number of threads. Inside `torch.compile(fullgraph=True)` no
  generator can be given: pass `seed=draw_seed(generator)`, drawn outside.
- Wrong dtypes raise TypeError, wrong shapes, devices and names ValueError. Values are not checked:
  a negative std gives NaN.

Where there are no kernels for a tensor's device, or under `use_backend("reference")`, the plain
PyTorch of `fastvae.reference` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, reference
from ._arguments import (
    TensorLike,
    check_bound,
    check_param,
    check_reduction,
    check_sample_shape,
    event_dims,
    gaussian_arguments,
    gaussians,
    log_prob_arguments,
    make_seed,
)
from ._autograd import apply, transformed
from ._functions import (
    GaussianLogProb,
    GaussianNLLLoss,
    KLDivergence,
    Rsample,
    RsampleKL,
    RsampleLogRatio,
)
from .bounds import Bound

__all__ = [
    "draw_seed",
    "gaussian_log_prob",
    "gaussian_nll_loss",
    "kl_divergence",
    "rsample",
    "rsample_kl",
    "rsample_log_ratio",
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
    code, numbers = check_param(param), check_bound(bound, param)
    (mu, logvar), shape = gaussian_arguments(mu=mu, logvar=logvar)
    sample_shape = check_sample_shape(sample_shape)
    seed = make_seed(seed, generator, mu.device, shape[0] if shape else None)
    if not has_kernels(mu):
        return reference.rsample(
            mu, logvar, param=param, bound=bound, sample_shape=sample_shape, seed=seed
        )
    return apply(Rsample, mu, logvar, seed, code, -1, sample_shape, numbers)


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
    """KL(q || p) between diagonal Gaussians, p = N(0, I) unless given.

    With lv = ln sigma^2, d = lv_q - lv_p, the sum over an event of

        1/2 (mu^2 + (e^lv - 1 - lv))                          to N(0, I)
        1/2 ((e^d - 1 - d) + (mu_q - mu_p)^2 e^{-lv_p})       to N(mu_p, e^{lv_p})

    Relative accuracy holds through posterior collapse (q -> p), and the result is never negative.

    Args:
        mu, logvar: q; `bound` is of its log-variance.
        prior_mu, prior_logvar: p, both or neither; read by the same `param`.
        event_ndim: how many trailing dimensions are summed; default all but the first.

    Returns:
        Nats, of shape `mu.shape[:-event_ndim]`.
    """
    code, numbers = check_param(param), check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.kl_divergence(*tensors, param=param, bound=bound, event_ndim=dims)
    return apply(KLDivergence, *tensors, *(None,) * (4 - len(tensors)), code, -1, dims, numbers)


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
    """`rsample(mu, logvar)` and `kl_divergence(mu, logvar, prior_mu, prior_logvar)` in one pass.

    The whole of what stands between encoder and decoder: two tensors are read and one is written,
    and backward draws the noise again instead of having stored it.

    Returns:
        z of q's broadcast shape and dtype, and the KL divergence in nats.

    Example:
        >>> z, kl = fastvae.rsample_kl(*encoder(x).chunk(2, dim=1))
        >>> loss = (kl - fastvae.gaussian_log_prob(x, decoder(z))).mean()
    """
    code, numbers = check_param(param), check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    dims = event_dims(event_ndim, len(shape))
    seed = make_seed(seed, generator, tensors[0].device, shape[0] if shape else None)
    if not has_kernels(tensors[0]):
        return reference.rsample_kl(*tensors, param=param, bound=bound, event_ndim=dims, seed=seed)
    missing = (None,) * (4 - len(tensors))
    return apply(RsampleKL, *tensors, *missing, seed, code, -1, dims, numbers)


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
    """z ~ q and ln p(z) - ln q(z) in one pass, p = N(0, I) unless given: the latent part of the
    log-weights of importance sampling and of the IWAE (Burda, Grosse & Salakhutdinov 2016), and
    minus a sample of KL(q || p).

    With z = mu + sigma eps and h = ln sigma, the sum over an event of

        h_q - h_p + 1/2 (eps^2 - ((z - mu_p) / sigma_p)^2)

    Args:
        mu, logvar: q; `bound` is of its log-variance.
        prior_mu, prior_logvar: p, both or neither; read by the same `param`.
        sample_shape: dimensions put in front, as in `rsample`: K samples are `(K,)`.
        event_ndim: how many trailing dimensions of q are summed; default all but the first.
        path_derivative: in the gradient, take q's parameters in ln q(z) as constants, so that it
            reaches them through z alone (Roeder, Wu & Duvenaud 2017). Values do not change. What
            is left out, the score, has mean 0.
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
    code, numbers = check_param(param), check_bound(bound, param)
    tensors, shape = gaussians(mu, logvar, prior_mu, prior_logvar)
    dims = event_dims(event_ndim, len(shape))
    sample_shape = check_sample_shape(sample_shape)
    seed = make_seed(seed, generator, tensors[0].device, shape[0] if shape else None)
    if not has_kernels(tensors[0]):
        return reference.rsample_log_ratio(
            *tensors,
            param=param,
            bound=bound,
            sample_shape=sample_shape,
            event_ndim=dims,
            path_derivative=path_derivative,
            seed=seed,
        )
    given = *tensors, *(None,) * (4 - len(tensors))
    settings = code, -1, dims, sample_shape, bool(path_derivative), numbers
    return apply(RsampleLogRatio, *given, seed, *settings)


def gaussian_log_prob(
    x: TensorLike,
    mean: TensorLike,
    logvar: TensorLike = 0.0,
    *,
    param: str = "logvar",
    bound: Bound | None = None,
    event_ndim: int | None = None,
) -> Tensor:
    """log N(x; mean, sigma^2) = -1/2 ((x - mean)^2 e^{-lv} + lv + ln 2 pi), summed over an event.

    Args:
        x, mean: the data and the decoder's output.
        logvar: a number, a learned scalar, or any tensor that broadcasts (per channel, per pixel):
            its gradient is reduced to its shape. Read by `param`: a fixed sigma of 0.1 is
            `gaussian_log_prob(x, mean, 0.1, param="std")`.
        bound: of `logvar`, such as the floor without which a pixel that is fitted exactly drives it
            to minus infinity.
        event_ndim: how many trailing dimensions are summed; default all but the first.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    code, numbers = check_param(param), check_bound(bound, param)
    tensors, scale, shape = log_prob_arguments(x, mean, logvar=logvar)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.gaussian_log_prob(
            x, mean, logvar, param=param, bound=bound, event_ndim=dims
        )
    return apply(GaussianLogProb, *tensors, scale, code, dims, numbers)


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
    """The mean or sum over the batch of -`gaussian_log_prob(x, mean, logvar)`, for a final loss.

    Where a gradient is wanted, it is made in the same pass: with a fixed sigma 12 bytes of float32
    are moved for each element, against 20 by a forward and a backward pass. The loss may then be
    scaled, accumulated or added to others: backward multiplies the gradient by what comes from
    above, unless that is 1, and never waits for a device. float16 takes the two passes, since a
    gradient kept in float16 could underflow before a `GradScaler` enlarges it.

    Args:
        x, mean, logvar, param, bound, event_ndim: as for `gaussian_log_prob`.
        reduction: "mean" or "sum" over the values that `gaussian_log_prob` would give.

    Returns:
        Nats, 0-d; float32 for half types.

    Raises:
        ValueError: also for another `reduction`.

    Example:
        >>> loss = fastvae.gaussian_nll_loss(x, decoder(z), 0.1, param="std")
        >>> (loss + kl.mean()).backward()
    """
    check_reduction(reduction)
    code, numbers = check_param(param), check_bound(bound, param)
    tensors, scale, shape = log_prob_arguments(x, mean, logvar=logvar)
    dims = event_dims(event_ndim, len(shape))
    if _final_gradients(tensors, shape):
        rows = shape[: len(shape) - dims]
        weight = 1.0 if reduction == "sum" else 1.0 / rows.numel()
        return GaussianNLLLoss.apply(*tensors, scale, code, dims, numbers, rows, weight)
    log_prob = gaussian_log_prob(x, mean, logvar, param=param, bound=bound, event_ndim=dims)
    return -reference.reduce(log_prob, reduction)


def _final_gradients(tensors: tuple[Tensor, Tensor, Tensor | None], shape: torch.Size) -> bool:
    """Whether kernels make the gradients of a final loss in its forward pass."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        has_kernels(given[0])
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in given)
        and shape.numel() > 0
        and given[0].dtype != torch.float16
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def draw_seed(
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    batch: int | None = None,
) -> Tensor:
    """Draws what the ops take as `seed`.

    Args:
        generator: of `device`; by default PyTorch's own, which `torch.manual_seed` sets.
        device: where the seed is wanted; by default the generator's device, or the CPU.
        batch: None for one 0-d seed; a number for one seed a row, so that an example's noise does
            not depend on the batch it is in.

    Returns:
        int64, 0-d or [batch]. No host synchronization.
    """
    if device is None:
        device = generator.device if generator is not None else "cpu"
    shape = () if batch is None else (batch,)
    return torch.empty(shape, dtype=torch.int64, device=device).random_(generator=generator)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the native path serves a tensor's device now."""
    return backend.native_enabled() and (tensor.is_cpu or (tensor.is_cuda and backend.HAS_CUDA))
