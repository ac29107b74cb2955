"""Where noise comes from: seeds, and the standard normals that a seed stands for.

What a call draws its noise from, its source, is a seed, a generator, or None: PyTorch's own one.

The noise is Philox4x32-10 (Salmon et al. 2011): key = the seed, counter = {column / 4, row low,
row high, sample}; four words give the normals of four columns as two Box-Muller pairs. A row is an
index along dimension 0, a column the C-order index inside its row, a sample the flat index in
`sample_shape`. With one seed a row, the key is the row's own and the row words are 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Generators",
    "Source",
    "box_muller",
    "draw",
    "draw_seed",
    "make_seed",
    "noise",
    "normals_of",
    "normals_of_seed",
    "philox",
    "uniforms",
    "uniforms_of_seed",
]

Source = Tensor | torch.Generator | None

Generators = torch.Generator | Sequence[torch.Generator]
"""One for all rows, alone or in a list, or one for each: a row's noise then does not depend on the
others."""

_CPU = torch.device("cpu")
_CPU_SEED = torch.zeros((), dtype=torch.int64, device="cpu")


# ---- Seeds ---------------------------------------------------------------------------------------


def draw_seed(
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    batch: int | None = None,
) -> Tensor:
    """Draws what the ops take as `seed`.

    Args:
        generator: of any device; by default PyTorch's own, which `torch.manual_seed` sets.
        device: where the seed is wanted; by default the generator's device, or the CPU.
        batch: None for one 0-d seed; a number for one seed a row, so that an example's noise does
            not depend on the batch it is in.

    Returns:
        int64, 0-d or [batch]. No host synchronization, unless the generator is of another device.
    """
    if device is None:
        device = generator.device if generator is not None else "cpu"
    shape = () if batch is None else (batch,)
    place = generator.device if generator is not None else device
    seed = torch.empty(shape, dtype=torch.int64, device=place).random_(generator=generator)
    return seed.to(device)


def make_seed(
    seed: Tensor | int | None,
    generator: Generators | None,
    like: Tensor | None,
    shape: Sequence[int],
) -> Source:
    """The source of a call's noise, a seed being a tensor on the device of `like`.

    The size of dimension 0 of `shape` is the only length that a per-row seed, or a list of
    generators, may have. What one generator of the device draws is drawn when the op runs; what
    comes from several, or from another device, is drawn here.
    """
    if seed is None and generator is None:
        return None
    assert like is not None
    device = like.device
    if seed is None:
        if torch.compiler.is_compiling():
            # No graph holds a generator, for PyTorch's own ops neither: an error if one graph is
            # demanded (fullgraph=True), else this call runs between two graphs.
            torch._dynamo.graph_break(
                msg="generator= cannot be compiled; want seed=fastvae.draw_seed(generator), drawn "
                "outside of the compiled function and passed to it"
            )
            return _draw_from(generator, device, shape)
        if isinstance(generator, torch.Generator) and generator.device.type == device.type:
            return generator
        return _draw_from(generator, device, shape)
    if generator is not None:
        raise ValueError("seed and generator are both given; want one of them")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has dtype {seed.dtype}; want torch.int64")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; want {device}, where the input is")
        if seed.dim() != 0 and (not shape or seed.shape != shape[:1]):
            rows = f", or [{shape[0]}]: one for each row" if shape else ""
            raise ValueError(f"seed has shape {list(seed.shape)}; want []{rows}")
        return seed
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is {seed!r}; want an int, an int64 tensor or None")
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; want a signed 64-bit integer")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _draw_from(generator: Any, device: torch.device, shape: Sequence[int]) -> Tensor:
    """One seed of a generator of any device, or one a row of as many generators."""
    if isinstance(generator, list | tuple) and len(generator) == 1:
        (generator,) = generator
    if isinstance(generator, torch.Generator):
        return draw(generator.device, generator).to(device)
    if not isinstance(generator, list | tuple):
        raise TypeError(
            f"generator is a {type(generator).__name__}; want a torch.Generator or a list of them"
        )
    for one in generator:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator holds a {type(one).__name__}; want torch.Generators")
    if not shape or len(generator) != shape[0]:
        rows = f"{shape[0]}, one for each row" if shape else "one generator, there are no rows"
        raise ValueError(f"generator is a list of {len(generator)}; want {rows}")
    seeds = torch.empty(len(generator), dtype=torch.int64, device=device)
    for seed, one in zip(seeds.unbind(), generator, strict=True):
        seed.copy_(draw(one.device, one))
    return seeds


def draw(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One seed for all rows, from `generator` or PyTorch's own."""
    if torch.compiler.is_compiling():  # the compiler takes this form only; its numbers are the same
        if torch._functorch.config.activation_memory_budget < 1:
            # PyTorch 2.13 then draws again in backward, and other numbers: wrong gradients.
            raise RuntimeError(
                "seed is None under torch.compile with an activation_memory_budget below 1; want "
                "seed=fastvae.draw_seed(...), drawn outside of the compiled function"
            )
        seed = torch.empty((), dtype=torch.int64, device=device)
        return torch.ops.aten.random.default(seed, generator=generator)
    seed = _empty_seed(device)
    if torch._C._are_functorch_transforms_active() and _under_vmap():
        # Of all random operations of integers, this one obeys vmap's `randomness`.
        return torch.randint(2**63 - 1, (), dtype=seed.dtype, device=device, generator=generator)
    return seed.random_(generator=generator)


def _under_vmap() -> bool:
    functorch = torch._C._functorch
    return any(
        interpreter.key() == functorch.TransformType.Vmap
        for interpreter in functorch.get_interpreter_stack() or ()
    )


def _empty_seed(device: torch.device) -> Tensor:
    # Half the time of the general case, which is 3 % of a small op's; but modes such as
    # FakeTensorMode know no tensor that they have not made.
    if device == _CPU and not torch._C._len_torch_dispatch_stack():
        return torch.empty_like(_CPU_SEED)
    return torch.empty((), dtype=torch.int64, device=device)


# ---- Normals -------------------------------------------------------------------------------------


def normals_of_seed(
    source: Source, shape: Sequence[int], sample_shape: Sequence[int], like: Tensor
) -> Tensor:
    """Those of a seed, which is drawn unless it is given; on the device and in the dtype of
    `like`."""
    seed = source if isinstance(source, Tensor) else draw(like.device, source)
    return noise(seed, shape, sample_shape=sample_shape).to(like.dtype)


def uniforms_of_seed(source: Source, logits: Tensor) -> Tensor:
    """One for each group of classes, of a seed, which is drawn unless it is given."""
    seed = source if isinstance(source, Tensor) else draw(logits.device, source)
    return uniforms(seed, logits.shape[:-1])


def normals_of(
    source: Source, shape: Sequence[int], sample_shape: Sequence[int], like: Tensor
) -> Tensor:
    """Those of a seed if it is given, else PyTorch's; on the device and in the dtype of `like`."""
    if source is None and like.shape == shape and not sample_shape:
        return torch.randn_like(like)
    if isinstance(source, Tensor):
        return normals_of_seed(source, shape, sample_shape, like)
    size = (*sample_shape, *shape)
    return torch.randn(size, generator=source, dtype=like.dtype, device=like.device)


_WORD = 0xFFFFFFFF


def noise(seed: Tensor, shape: Sequence[int], *, sample_shape: Sequence[int] = ()) -> Tensor:
    """The standard normals, float32 of shape `sample_shape + shape`, that `seed` stands for.

    Args:
        seed: int64 on the wanted device, 0-d or one for each index along dimension 0 of `shape`.
        shape: of one sample: rows along dimension 0, columns along the others.
        sample_shape: how many samples; more samples never change the first ones.
    """
    a, b, c, d = _words(seed, shape, sample_shape)
    return _of_columns([*box_muller(a, b), *box_muller(c, d)], shape, sample_shape)


def uniforms(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers between 0 and 1, float64, from the same words: (word + 1/2) 2^-32."""
    return (_of_columns(_words(seed, shape, ()), shape, ()).double() + 0.5) * 2.0**-32


def _words(
    seed: Tensor, shape: Sequence[int], sample_shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of four columns each, [samples, rows, columns / 4]."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    counts = (math.prod(sample_shape), rows, (columns + 3) // 4)
    grid = [torch.arange(n, device=seed.device) for n in counts]
    sample, row, block = torch.meshgrid(*grid, indexing="ij")
    if seed.dim() == 1:
        seed, row = seed[:, None], torch.zeros_like(row)
    counter = (block, row & _WORD, row >> 32, sample)
    return philox(counter, seed & _WORD, (seed >> 32) & _WORD)


def _of_columns(
    four: Sequence[Tensor], shape: Sequence[int], sample_shape: Sequence[int]
) -> Tensor:
    """Numbers of columns 4k, 4k + 1, ... side by side, of shape `sample_shape + shape`."""
    side_by_side = torch.stack(tuple(four), dim=-1).flatten(-2)[..., : math.prod(shape[1:])]
    return side_by_side.reshape((*sample_shape, *shape))


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
