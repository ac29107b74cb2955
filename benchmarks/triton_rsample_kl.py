"""rsample_kl as a GPU programmer would write it in Triton: one kernel forward, one backward.

The same fusion as fastvae's: nothing is saved but the inputs and a seed, and the noise is drawn
again in backward. It serves contiguous [rows, columns] tensors and the standard normal prior, with
Triton's own generator, whose logarithm, sine and cosine are approximate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns of each of the four normals that one call of Philox gives
TILE = 4 * BLOCK
TILES = 8  # of a program at most
MANY_PROGRAMS = 1024


@triton.jit
def _normals(seed, row, columns, tile, BLOCK: tl.constexpr):
    """Four blocks of normals, for a tile of a row."""
    counter = (row * tl.cdiv(columns, 4 * BLOCK) + tile) * BLOCK + tl.arange(0, BLOCK)
    return tl.randn4x(seed, counter)


@triton.jit
def _element(mu, logvar, z, offset, end, eps):
    """Writes z; returns the divergence."""
    mask = offset < end
    m = tl.load(mu + offset, mask, 0.0).to(tl.float32)
    lv = tl.load(logvar + offset, mask, 0.0).to(tl.float32)
    sigma = tl.exp(0.5 * lv)
    tl.store(z + offset, m + sigma * eps, mask)
    return 0.5 * (m * m + sigma * sigma - 1 - lv)


@triton.jit
def _forward(mu, logvar, seed, z, kl, columns, tiles, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.load(seed)
    end = (row + 1) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(part * tiles, min((part + 1) * tiles, tl.cdiv(columns, 4 * BLOCK))):
        a, b, c, d = _normals(s, row, columns, tile, BLOCK)
        offset = row * columns + tile * 4 * BLOCK + tl.arange(0, BLOCK)
        total += _element(mu, logvar, z, offset, end, a)
        total += _element(mu, logvar, z, offset + BLOCK, end, b)
        total += _element(mu, logvar, z, offset + 2 * BLOCK, end, c)
        total += _element(mu, logvar, z, offset + 3 * BLOCK, end, d)
    tl.store(kl + row * tl.num_programs(1) + part, tl.sum(total))


@triton.jit
def _gradient(mu, logvar, grad_z, grad_mu, grad_logvar, g, offset, end, eps):
    mask = offset < end
    m = tl.load(mu + offset, mask, 0.0).to(tl.float32)
    lv = tl.load(logvar + offset, mask, 0.0).to(tl.float32)
    gz = tl.load(grad_z + offset, mask, 0.0).to(tl.float32)
    sigma = tl.exp(0.5 * lv)
    tl.store(grad_mu + offset, gz + g * m, mask)
    tl.store(grad_logvar + offset, 0.5 * (gz * eps * sigma + g * (sigma * sigma - 1)), mask)


@triton.jit
def _backward(
    mu, logvar, seed, grad_z, grad_kl, grad_mu, grad_logvar, columns, tiles, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, g = tl.load(seed), tl.load(grad_kl + row)
    end = (row + 1) * columns
    for tile in range(part * tiles, min((part + 1) * tiles, tl.cdiv(columns, 4 * BLOCK))):
        a, b, c, d = _normals(s, row, columns, tile, BLOCK)
        o = row * columns + tile * 4 * BLOCK + tl.arange(0, BLOCK)
        _gradient(mu, logvar, grad_z, grad_mu, grad_logvar, g, o, end, a)
        _gradient(mu, logvar, grad_z, grad_mu, grad_logvar, g, o + BLOCK, end, b)
        _gradient(mu, logvar, grad_z, grad_mu, grad_logvar, g, o + 2 * BLOCK, end, c)
        _gradient(mu, logvar, grad_z, grad_mu, grad_logvar, g, o + 3 * BLOCK, end, d)


def _parts(rows: int, columns: int) -> tuple[int, int]:
    """Programs of a row, and tiles of a program."""
    tiles = triton.cdiv(columns, TILE)
    parts = min(tiles, max(triton.cdiv(MANY_PROGRAMS, rows), triton.cdiv(tiles, TILES)))
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each


class _RsampleKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = mu.shape
        parts, tiles = _parts(rows, columns)
        seed = torch.empty((), dtype=torch.int64, device=mu.device).random_()
        z = torch.empty_like(mu)
        kl = torch.empty(rows, parts, dtype=torch.float32, device=mu.device)
        _forward[rows, parts](mu, logvar, seed, z, kl, columns, tiles, BLOCK)
        ctx.save_for_backward(mu, logvar, seed)
        return z, kl.sum(1)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar, seed = ctx.saved_tensors
        rows, columns = mu.shape
        parts, tiles = _parts(rows, columns)
        grads = torch.empty_like(mu), torch.empty_like(logvar)
        _backward[rows, parts](
            mu, logvar, seed, grad_z, grad_kl.contiguous(), *grads, columns, tiles, BLOCK
        )
        return grads


def rsample_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """z and KL(N(mu, e^logvar) || N(0, I)) of each row, for contiguous [rows, columns] tensors."""
    return _RsampleKL.apply(mu, logvar)
