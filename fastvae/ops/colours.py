"""The colours of a pixel as a mixture: PixelCNN++'s likelihood, in one pass over its planes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .arguments import TensorLike, check_levels, tensor_arguments, weight_argument
from .declare import declare, loss_of
from .elements import computed_in
from .op import Request
from .pixels import _discretized_logistic, _discretized_logistic_eager

__all__ = ["colour_mixture_log_prob", "colour_mixture_nll_loss"]


def _colour_mixture(
    x: Tensor,
    parameters: Tensor,
    pixel_weight: Tensor | None,
    *,
    components: int,
    least_log_scale: float,
    bins: int,
    low: float,
    high: float,
    log_mass: Callable[..., Tensor] = _discretized_logistic,
) -> Tensor:
    """ln sum_k softmax(l)_k prod_c P(x_c; m_kc, s_kc), summed over pixels as they weigh."""
    channels = x.shape[1]
    if pixel_weight is not None:  # what is left out is computed for another pixel
        counts = (pixel_weight != 0).unsqueeze(1)
        x, parameters = torch.where(counts, x, low), torch.where(counts, parameters, 0)
    logits, rest = parameters.split((components, parameters.shape[1] - components), 1)
    rest = rest.unflatten(1, (channels, -1, components))
    mean, log_scale = rest[:, :, 0], rest[:, :, 1].clamp(min=least_log_scale)
    if channels == 3:
        a, red, green = torch.tanh(rest[:, :, 2]), x[:, :1], x[:, 1:2]
        blue = a[:, 1] * red + a[:, 2] * green
        shift = torch.stack((torch.zeros_like(blue), a[:, 0] * red, blue), 1)
        mean = mean + shift
    log_p = log_mass(x.unsqueeze(2), mean, log_scale, bins=bins, low=low, high=high)
    joint = torch.log_softmax(logits, 1) + log_p.sum(1)
    log_p = torch.logsumexp(joint, 1)
    return (log_p if pixel_weight is None else pixel_weight * log_p).sum(1)


_log_mass_eager = partial(_discretized_logistic_eager, event=torch.Size())


@declare(_colour_mixture, eager=partial(_colour_mixture, log_mass=_log_mass_eager), whole=True)
def colour_mixture_log_prob(
    x: Tensor,
    parameters: Tensor,
    *,
    components: int,
    bins: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    least_log_scale: float = -7.0,
    channel_dim: int = 1,
    weight: TensorLike | None = None,
) -> Request:
    """ln of a mixture of discretized logistics for the colours of each pixel, summed over pixels
    (Salimans et al. 2017, "PixelCNN++"; VDVAE and NVAE use it too).

    Where there are three channels, the mean of green depends on red and that of blue on both, by
    coefficients that go through tanh; one channel is grey. With K components the parameters are
    planes: K logits; then for each channel K means, K logarithms of scales and, of three channels,
    K coefficients: 10 K in all, or 3 K. That is the order of PixelCNN++, and of VDVAE's 100
    channels with `channel_dim=-1`. Planes that lie one after the other in memory, as a convolution
    leaves them, are read in place.

    Args:
        x: [B, 3 or 1, ...], levels as in `discretized_logistic_log_prob`; it has no gradient.
        parameters: [B, 10 K or 3 K, ...].
        components: K.
        bins, low, high: how many levels, the first and the last.
        least_log_scale: floor of the scales' logarithms, beyond which they have no gradient.
        channel_dim: of both, where the channels are.
        weight: of each pixel, what broadcasts to [B, ...] without the channels, or a mask of what
            is missing. A pixel that weighs 0 is left out, even if it is NaN.

    Returns:
        Nats, [B]; float32 for half types.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or levels, or x or weight that requires a gradient.
    """
    check_levels(bins, low, high)
    if isinstance(components, bool) or not isinstance(components, int) or components < 1:
        raise ValueError(f"components is {components!r}; want a whole number above 0")
    for name, t in (("x", x), ("parameters", parameters)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}; want a tensor")
    if x.requires_grad:
        raise ValueError("x requires a gradient; want data, or x.detach()")
    if x.dim() != parameters.dim() or not (x.dim() >= 2 and -x.dim() <= channel_dim < x.dim()):
        raise ValueError(
            f"x has shape {list(x.shape)}, parameters {list(parameters.shape)} and channel_dim is "
            f"{channel_dim}; want as many dimensions, two at least, and one of them"
        )
    x, parameters = x.movedim(channel_dim, 1), parameters.movedim(channel_dim, 1)
    channels, planes = x.shape[1], parameters.shape[1]
    if channels not in (1, 3) or planes != components * (10 if channels == 3 else 3):
        raise ValueError(
            f"x has {channels} channels and parameters {planes} for {components} components; want "
            f"3 and {10 * components}, or 1 and {3 * components}"
        )
    if x.shape[0] != parameters.shape[0] or x.shape[2:] != parameters.shape[2:]:
        raise ValueError(
            f"x has shape {list(x.shape)} and parameters {list(parameters.shape)}, the channels "
            "second; want one shape but for these"
        )
    (x, parameters), _ = tensor_arguments(x=x.unsqueeze(2), parameters=parameters.unsqueeze(1))
    x, parameters = computed_in(x.squeeze(2)), computed_in(parameters.squeeze(1))
    pixels = torch.Size((x.shape[0], *x.shape[2:]))
    weight = weight_argument(weight, parameters, pixels)
    if weight is not None:
        weight = weight.expand(pixels).flatten(1)
    return (x.flatten(2), parameters.flatten(2), weight), {
        "components": components,
        "least_log_scale": float(least_log_scale),
        "bins": bins,
        "low": float(low),
        "high": float(high),
    }


colour_mixture_nll_loss = loss_of(colour_mixture_log_prob)
