"""A direct call of torch.ops.fastvae with wrong things raises: nothing reads foreign memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

NAN = float("nan")
M, L = torch.zeros(4, 6), torch.zeros(4, 6)
SEEDS = torch.arange(4)
ops = torch.ops.fastvae
S = torch.tensor(1)
G = torch.ones(4)
P = torch.zeros(4, 12)

WRONG_OPERATOR_CALLS: dict[str, Callable[[], object]] = {
    "param -1": lambda: ops.rsample(M, L, S, -1, -1, []),
    "param 7": lambda: ops.kl_divergence(M, L, None, None, None, 7, -1, 1),
    "bound of two numbers": lambda: ops.rsample(M, L, S, 0, -1, [], [0.0, 1.0]),
    "bound of kind 3": lambda: ops.kl_divergence(M, L, None, None, None, 0, -1, 1, [3.0, 0.0, 1.0]),
    "bound of no kind": lambda: ops.gaussian_log_prob(M, L, None, None, 0.0, 0, 1, [NAN, 0.0, 1.0]),
    "event_ndim 99": lambda: ops.kl_divergence(M, L, None, None, None, 0, -1, 99),
    "event_ndim 3 of 2": lambda: ops.rsample_kl(M, L, None, None, S, None, 0, -1, 3),
    "event_ndim -2": lambda: ops.gaussian_log_prob(M, L, None, None, 0.0, 0, -2),
    "shapes": lambda: ops.rsample(M, L[:3], S, 0, -1, []),
    "prior's shape": lambda: ops.kl_divergence(M, L, M[:, :5], L, None, 0, -1, 1),
    "integers": lambda: ops.rsample(M.int(), L.int(), S, 0, -1, []),
    "mixed dtypes": lambda: ops.rsample(M, L.double(), S, 0, -1, []),
    "mixed devices": lambda: ops.rsample(M, L.to("meta"), S, 0, -1, []),
    "sparse": lambda: ops.rsample(M.to_sparse(), L.to_sparse(), S, 0, -1, []),
    "meta seed": lambda: ops.rsample(M, L, S.to("meta"), 0, -1, []),
    "float seed": lambda: ops.rsample(M, L, S.float(), 0, -1, []),
    "int32 seed": lambda: ops.rsample_kl(M, L, None, None, S.int(), None, 0, -1, 1),
    "seeds of 3 rows": lambda: ops.rsample(M, L, SEEDS[:3], 0, -1, []),
    "seeds of 2 dimensions": lambda: ops.rsample(M, L, SEEDS[None], 0, -1, []),
    "seeds of no row": lambda: ops.rsample(M[0, 0], L[0, 0], SEEDS, 0, -1, []),
    "negative sample shape": lambda: ops.rsample(M, L, S, 0, -1, [-2]),
    "two negative sample sizes": lambda: ops.rsample(M, L, S, 0, -1, [-2, -2]),
    "not packed": lambda: ops.rsample(P, None, S, 0, -1, []),
    "packed_dim 2 of 2": lambda: ops.rsample(P, None, S, 0, 2, []),
    "odd packing": lambda: ops.rsample(P[:, 1:], None, S, 0, 1, []),
    "packed, broadcast": lambda: ops.kl_divergence(P[:1], None, P, None, None, 0, 1, 1),
    "packed, prior of another shape": lambda: ops.kl_divergence(
        P, None, P[:, 2:], None, None, 0, 1, 1
    ),
    "prior_logvar missing": lambda: ops.kl_divergence(M, L, M, None, None, 0, -1, 1),
    "prior_mu missing": lambda: ops.kl_divergence(M, L, None, L, None, 0, -1, 1),
    "z's gradient of another shape": lambda: ops.rsample_backward(M[:, :5], M, L, S, 0, -1, [], 3),
    "z's gradient that broadcasts": lambda: ops.rsample_backward(M[:1], M, L, S, 0, -1, [], 3),
    "z's gradient without the samples": lambda: ops.rsample_backward(M, M, L, S, 0, -1, [2], 3),
    "z's gradient of another dtype": lambda: ops.rsample_backward(
        M.double(), M, L, S, 0, -1, [], 3
    ),
    "z's gradient on another device": lambda: ops.rsample_backward(
        M.to("meta"), M, L, S, 0, -1, [], 3
    ),
    "KL's gradient of another shape": lambda: ops.kl_divergence_backward(
        G[:3], M, L, None, None, None, 0, -1, 1, 3
    ),
    "KL's gradient of elements": lambda: ops.kl_divergence_backward(
        M, M, L, None, None, None, 0, -1, 1, 3
    ),
    "KL's gradient of another dtype": lambda: ops.kl_divergence_backward(
        G.half(), M, L, None, None, None, 0, -1, 1, 3
    ),
    "KL's gradient in half": lambda: ops.kl_divergence_backward(
        G.half(), M.half(), L.half(), None, None, None, 0, -1, 1, 3
    ),
    "backward's event_ndim 99": lambda: ops.kl_divergence_backward(
        G, M, L, None, None, None, 0, -1, 99, 3
    ),
    "both gradients, z's wrong": lambda: ops.rsample_kl_backward(
        M[:3], G, M, L, None, None, S, None, 0, -1, 1, 3
    ),
    "both gradients, KL's wrong": lambda: ops.rsample_kl_backward(
        M, M, M, L, None, None, S, None, 0, -1, 1, 3
    ),
    "both gradients, the seed wrong": lambda: ops.rsample_kl_backward(
        M, G, M, L, None, None, SEEDS[:2], None, 0, -1, 1, 3
    ),
    "log-ratio's gradient without the samples": lambda: ops.rsample_log_ratio_backward(
        torch.zeros(2, 4, 6), G, M, L, None, None, S, None, 0, -1, 1, [2], False, 3
    ),
    "log-ratio's event_ndim 3 of 2": lambda: ops.rsample_log_ratio(
        M, L, None, None, S, None, 0, -1, 3, [2], False
    ),
    "log_prob's gradient of another shape": lambda: ops.gaussian_log_prob_backward(
        G[:, None], M, L, None, None, 0.0, 0, 1, 3
    ),
    "logits of another shape": lambda: ops.bernoulli_log_prob(M, L[:, :2], None, 1),
    "logits of another dtype": lambda: ops.bernoulli_log_prob(M, L.double(), None, 1),
    "pixels' event_ndim 99": lambda: ops.bernoulli_log_prob(M, L, None, 99),
    "pixels' gradient of another shape": lambda: ops.bernoulli_log_prob_backward(
        G[:, None], M, L, None, 1, 3
    ),
    "pixels' gradient in half": lambda: ops.bernoulli_log_prob_backward(G.half(), M, L, None, 1, 3),
    "pixels' scale of another shape": lambda: ops.laplace_log_prob(M, L, L[:, :2], None, 0.0, 1),
    "one level": lambda: ops.discretized_logistic_log_prob(M, L, L, None, 1, 0.0, 1.0, 1),
    "log_prob's mean of another shape": lambda: ops.gaussian_log_prob_backward(
        G, M, L[:, :2], None, None, 0.0, 0, 1, 3
    ),
}


@pytest.mark.parametrize("call", WRONG_OPERATOR_CALLS.values(), ids=WRONG_OPERATOR_CALLS)
def test_wrong_calls_of_the_operators_raise(call: Callable[[], Tensor]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        call()
    assert "Declaration" not in str(error.value)  # as of arguments that the schema does not know


@pytest.mark.parametrize("event_ndim", [-1, -2, 3, 2**40])
def test_operators_name_a_wrong_event_ndim(event_ndim: int) -> None:
    for call in (
        lambda: ops.kl_divergence(M, L, None, None, None, 0, -1, event_ndim),
        lambda: ops.rsample_kl(M, L, None, None, S, None, 0, -1, event_ndim),
        lambda: ops.gaussian_log_prob(M, L, None, None, 0.0, 0, event_ndim),
        lambda: ops.kl_divergence_backward(G, M, L, None, None, None, 0, -1, event_ndim, 3),
        lambda: ops.rsample_kl_backward(M, G, M, L, None, None, S, None, 0, -1, event_ndim, 3),
        lambda: ops.gaussian_log_prob_backward(G, M, L, None, None, 0.0, 0, event_ndim, 3),
        lambda: ops.bernoulli_log_prob(M, L, None, event_ndim),
        lambda: ops.bernoulli_log_prob_backward(G, M, L, None, event_ndim, 3),
        lambda: ops.laplace_log_prob(M, L, None, None, 0.0, event_ndim),
        lambda: ops.discretized_logistic_log_prob(M, L, L, None, 8, 0.0, 1.0, event_ndim),
    ):
        with pytest.raises(RuntimeError, match=rf"event_ndim is {event_ndim}"):
            call()


def test_unneeded_bits_of_needs_are_ignored() -> None:
    grads = ops.kl_divergence_backward(G, M, L, None, None, None, 0, -1, 1, -1)
    assert [g is not None for g in grads] == [True, True, False, False]
