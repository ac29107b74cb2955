"""`DiagonalGaussian.from_params`: two halves of one tensor in, one packed gradient out."""

from __future__ import annotations

import pytest
import torch
from accuracy import same_bits
from cases import DTYPES, PARAMS, SEED
from torch import Tensor

import fastvae
from fastvae import DiagonalGaussian

each_param = pytest.mark.parametrize("param", PARAMS)

PACKED = {  # shape of params, dim
    "vector": ((8,), 0),
    "matrix": ((4, 12), 1),
    "rows": ((6, 5), 0),
    "last": ((3, 4, 10), -1),
    "image": ((3, 8, 5, 6), 1),
    "channels_last": ((3, 8, 5, 6), 1),
    "one element each": ((7, 2), 1),  # the halves lie two apart
    "channels_last, one channel each": ((3, 2, 5, 6), 1),
    "empty": ((0, 6), 1),
}


def packed(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    shape, _ = PACKED[name]
    generator = torch.Generator().manual_seed(seed)
    params = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    params = params.to(device, dtype)
    if name.startswith("channels_last"):
        params = params.contiguous(memory_format=torch.channels_last)
    return params.requires_grad_()


@pytest.mark.parametrize("name", PACKED)
@each_param
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_params_is_chunk(
    name: str, param: str, dtype: torch.dtype, device: torch.device
) -> None:
    dim = PACKED[name][1]
    params, prior_params = (packed(name, dtype, device, seed) for seed in (0, 1))
    q, p = (DiagonalGaussian.from_params(t, dim, param=param) for t in (params, prior_params))
    cq, cp = (DiagonalGaussian(*t.chunk(2, dim), param=param) for t in (params, prior_params))
    assert repr(q) == repr(cq)
    for ours, theirs in (
        ((q.rsample(seed=SEED),), (cq.rsample(seed=SEED),)),
        ((q.rsample((2,), seed=SEED),), (cq.rsample((2,), seed=SEED),)),
        ((q.kl(),), (cq.kl(),)),
        ((q.kl(p),), (cq.kl(cp),)),
        (q.rsample_kl(seed=SEED), cq.rsample_kl(seed=SEED)),
        (q.rsample_kl(p, seed=SEED), cq.rsample_kl(cp, seed=SEED)),
        (q.rsample_log_ratio(seed=SEED), cq.rsample_log_ratio(seed=SEED)),
        (
            q.rsample_log_ratio(p, path_derivative=True, seed=SEED),
            cq.rsample_log_ratio(cp, path_derivative=True, seed=SEED),
        ),
        (q.rsample_log_ratio(p, (3,), seed=SEED), cq.rsample_log_ratio(cp, (3,), seed=SEED)),
        ((q.kl(cp),), (cq.kl(p),)),
    ):
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
        upstream = [
            torch.linspace(-1, 2, y.numel(), device=device).view_as(y).to(y.dtype) for y in ours
        ]
        grads, expected = (
            torch.autograd.grad(
                ys, (params, prior_params), upstream, allow_unused=True, retain_graph=True
            )
            for ys in (ours, theirs)
        )
        for grad, right in zip(grads, expected, strict=True):
            assert (grad is None) == (right is None)
            if grad is not None:
                assert same_bits(grad, right)


@pytest.mark.parametrize("name", PACKED)
def test_backward_of_packed_parameters_writes_one_tensor(name: str, device: torch.device) -> None:
    if not torch.zeros(PACKED[name][0]).numel():
        pytest.skip("nothing to write")
    params = packed(name, torch.float32, device)
    q = DiagonalGaussian.from_params(params, PACKED[name][1])
    z, kl = q.rsample_kl(seed=SEED)
    assert z.grad_fn.next_functions[0][0].variable is params  # no chunk between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (grad,) = torch.autograd.grad((z, kl), params, (torch.ones_like(z), torch.ones_like(kl)))
    assert grad.stride() == params.stride()
    called = {event.key for event in profile.key_averages()}
    assert "fastvae::rsample_kl_backward" in called
    assert not {"aten::cat", "aten::zeros", "aten::zero_", "aten::add", "aten::copy_"} & called


def test_packed_gradcheck_and_gradgradcheck(device: torch.device) -> None:
    params, prior = (
        packed("matrix", torch.float64, device, seed)[:2].detach().requires_grad_()
        for seed in (0, 1)
    )

    def run(params: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        q, p = DiagonalGaussian.from_params(params), DiagonalGaussian.from_params(prior)
        values = q.rsample(seed=SEED), q.kl(), q.kl(p)
        return *values, *q.rsample_kl(p, seed=SEED), *q.rsample_log_ratio(p, seed=SEED)

    assert torch.autograd.gradcheck(run, (params, prior))
    assert torch.autograd.gradgradcheck(run, (params, prior))


def test_both_backends_agree_on_packed_parameters(device: torch.device) -> None:
    params = packed("image", torch.float32, device)
    q = DiagonalGaussian.from_params(params)
    results = []
    for backend in ("native", "reference"):
        with fastvae.use_backend(backend):
            z, kl = q.rsample_kl(seed=SEED)
            results.append((z, kl, *torch.autograd.grad(z.sum() + kl.sum(), params)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
