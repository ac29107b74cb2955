"""Whether gradients reach mu and sigma through z."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .latents import Carrier, Group, rerun
from .report import Finding
from .runs import Program, Run
from .trace import Line, Replacement

__all__ = ["faults"]


def faults(program: Program, base: Run, group: Group) -> Iterator[Finding]:
    """Of the first of a Gaussian's samples: z behind its parameters, and the loss behind z."""
    sample = group.first
    if sample.draw.parametric:
        says = (
            "z is drawn from N(mu, sigma²) directly (torch.normal, or sample instead of rsample), "
            "and no gradient passes from it to mu and sigma."
        )
        yield Finding.at(sample.draw.line, "not-differentiable", says, 0.0, "sampling")
        return
    if not group.problem:
        mu, scale = _into_z(program, base, group)
        if mu <= 1e-6 or scale <= 1e-6:
            what = "mu and sigma" if max(mu, scale) <= 1e-6 else "mu" if mu <= 1e-6 else "sigma"
            roots = 0
            for c in group.mu if mu <= 1e-6 else group.scale:
                roots |= 1 << c.value.index
            says = (
                f"z is made without gradient (detach, .data or no_grad): none reaches {what} from "
                "it."
            )
            where = _lost(base, roots, sample.z.ancestors) or sample.z.line
            yield Finding.at(where, "not-differentiable", says, min(mu, scale), "sampling")
            return
    if sample.used and not _behind_z(program, base, group):
        where = _lost(base, 1 << sample.z.index, None) or sample.z.line
        says = "z is detached before the decoder: the likelihood has no gradient by mu and sigma."
        yield Finding.at(where, "not-differentiable", says, 0.0, "sampling")


def _into_z(program: Program, base: Run, group: Group) -> tuple[float, float]:
    """Gradients of sum z * r by mu and sigma, relative to what they should be."""
    leaves: dict[tuple[int, int], Tensor] = {}

    def leaf(key: tuple[int, int]) -> Replacement:
        def make(t: Tensor) -> Tensor:
            leaves[key] = t.detach().clone().requires_grad_()
            return leaves[key].clone()

        return make

    carriers = [*group.mu, *group.scale]
    keys = [c.value.key for c in carriers if c.value.key is not None]
    run = rerun(program, base, replace={key: leaf(key) for key in keys})
    z = run.trace.values[group.first.z.index].tensor
    if not z.requires_grad:
        return 0.0, 0.0
    noise = group.first.noise.to(z)
    grads = torch.autograd.grad(
        z.sum() + (z * noise).sum(), list(leaves.values()), allow_unused=True
    )
    found = dict(zip(leaves, grads, strict=True))

    def size(carriers: list[Carrier]) -> float:
        sizes = [
            0.0 if (g := found[c.value.key]) is None else g.abs().max().item()  # type: ignore[index]
            for c in carriers
        ]
        return max(sizes)

    return size(group.mu), size(group.scale)


def _behind_z(program: Program, base: Run, group: Group) -> bool:
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()

    keys = [s.z.key for s in group.samples if s.z.key is not None]
    loss = rerun(program, base, replace=dict.fromkeys(keys, leaf)).loss
    if not loss.requires_grad:
        return False
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return any(g is not None for g in grads)  # zeros may be a saturated layer's


def _lost(base: Run, sources: int, before: int | None) -> Line | None:
    """Where the first tensor is made of the sources that has no gradient."""
    loss = base.trace.find(base.loss)
    for v in base.trace.values:
        if sources >> v.index & 1 or not v.of(sources) or not v.tensor.is_floating_point():
            continue
        on_the_way = before >> v.index & 1 if before is not None else loss and loss.of(1 << v.index)
        if on_the_way and not v.tensor.requires_grad and not v.stale:
            return v.line
    return None
