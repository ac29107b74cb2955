"""Calls of the ops that end in the logarithm of a sum, which the table of cases is not made for:
all that they give, to compare between builds and configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastvae
from fastvae.ops.items import chosen_log_prob

# Rows, components, dimensions: below a vector, a panel and a block, and above.
PAIRS = ((1, 1, 1), (5, 3, 2), (13, 37, 19), (70, 16, 9), (3, 300, 30), (9, 5, 300))
SQUARES = ((2, 1), (20, 3), (67, 2))
COLOURS = ((1, 3, 5, 2), (2, 1, 300, 3), (1, 3, 33, 10))
# Rows, groups, classes.
CATEGORICALS = ((2, 1, 1), (3, 2, 5), (2, 32, 32), (2, 33, 40), (1, 2, 1300))
ITEMS = ((2, 1), (3, 20), (1, 513), (2, 3000))


def results() -> Iterator[tuple[str, list[Tensor]]]:
    """Values and gradients by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for rows, k, size in PAIRS:
        near = [normal(rows, size), normal(k, size), normal(k, size) / 2]
        weights = torch.log_softmax(normal(k), 0)
        for dtype in (torch.float32, torch.float64):
            for place, z in (("near", near[0]), ("far", 30 * near[0] + 100)):
                tensors = [t.to(dtype) for t in (z, *near[1:], weights)]
                name = f"{rows, k, size} {place} {dtype}"
                yield f"mixture {name}", _call(fastvae.mixture_log_prob, tensors)
                yield f"pairs {name}", _call(fastvae.pairwise_log_prob, tensors[:3])
    for rows, size in SQUARES:
        for spread in (1.0, 100.0):
            tensors = [(spread * normal(rows, size)).float(), *(normal(2, rows, size) / 2).float()]
            found = _call(lambda *t: torch.stack(fastvae.aggregate_log_prob(*t)), tensors)
            yield f"aggregate {rows, size} {spread}", found
    for rows, n in ITEMS:
        logits, x = 3 * normal(rows, n), normal(rows, n).abs()
        chosen = torch.randint(n, (rows,), generator=generator)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            name = f"{rows, n} {dtype}"
            tensors = [x.to(dtype), logits.to(dtype)]
            yield f"multinomial {name}", _call(fastvae.multinomial_log_prob, tensors)
            yield f"chosen {name}", _call(lambda t, x=chosen: chosen_log_prob(x, t), tensors[1:])
    for sizes in CATEGORICALS:
        q, p = 3 * normal(2, *sizes)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for mix in (0.0, 0.01):
                f = functools.partial(
                    fastvae.balanced_categorical_kl_divergence, uniform_mix=mix, free_nats=0.5
                )
                yield f"kl {sizes} {mix} {dtype}", _call(f, [q.to(dtype), p.to(dtype)])
                f = functools.partial(
                    fastvae.straight_through_categorical,
                    uniform_mix=10 * mix,
                    seed=torch.arange(sizes[0]),
                )
                yield f"sample {sizes} {mix} {dtype}", _call(f, [q.to(dtype)])
    for rows, channels, count, k in COLOURS:
        x = torch.randint(256, (rows, channels, count), generator=generator) * (2 / 255) - 1
        parameters = normal(rows, k * (10 if channels == 3 else 3), count)
        for dtype in (torch.float32, torch.float64):
            f = functools.partial(fastvae.colour_mixture_log_prob, x.to(dtype), components=k)
            found = _call(f, [parameters.to(dtype)])
            yield f"colours {rows, channels, count, k} {dtype}", found


def _call(f: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves)
    upstream = torch.linspace(-1, 2, max(y.numel(), 1)).to(y.dtype)[: y.numel()].reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
