"""What a model is conditioned on: tensors and what holds them, cut into batches with the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.models import conditions
from fastvae.training.settings import Settings
from fastvae.training.trainer import Trainer

N, D, L = 50, 6, 2
CPU = torch.device("cpu")


class Label(NamedTuple):
    kind: Any
    shift: Any


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str]] = {
    "tensor": (lambda c: c, lambda c: c, "condition"),
    "dictionary": (lambda c: {"shift": c}, lambda c: c["shift"], "condition['shift']"),
    "nested": (
        lambda c: {"name": "a", "parts": [torch.zeros(N), Label(None, (c,))]},
        lambda c: c["parts"][1].shift[0],
        "condition['parts'][1].shift[0]",
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


class Shifted(nn.Module):
    """A network that adds what it is conditioned on."""

    def __init__(self, inputs: int, outputs: int, shift: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.shift = shift

    def forward(self, x: Tensor, condition: Any) -> Tensor:
        return self.linear(x) + self.shift(condition)


def conditional(shift: Callable[[Any], Tensor]) -> fastvae.VAE:
    torch.manual_seed(0)
    encoder, decoder = Shifted(D, 2 * L, shift), Shifted(L, D, shift)
    return fastvae.VAE(encoder, decoder, latent_shape=L).double()


def unconditional(model: fastvae.VAE) -> fastvae.VAE:
    return fastvae.VAE(model.encoder.linear, model.decoder.linear, latent_shape=L)


@forms
def test_methods_that_cut_and_expand(form: str) -> None:
    """Where the condition is 0, all is as without one; elsewhere it is not."""
    wrap, shift, _ = FORMS[form]
    model = conditional(shift)
    plain = unconditional(model)
    x, other = torch.randn(2, N, D, dtype=torch.float64).unbind()
    options = {"batch_size": 16, "aggregate": 30, "seed": 3}
    right = plain.report(x, **options)
    zeros, ones = (wrap(torch.full((N, 1), value).double()) for value in (0.0, 1.0))
    assert model.report(x, condition=zeros, **options) == right
    assert model.report(x, condition=ones, **options) != right
    between = plain.interpolate(x, other)
    torch.testing.assert_close(model.interpolate(x, other, condition=zeros), between)
    assert not torch.allclose(model.interpolate(x, other, condition=ones), between)
    model.objective = plain.objective = fastvae.IWAE(samples=5)
    torch.testing.assert_close(model(x, zeros, seed=3).loss, plain(x, seed=3).loss)
    assert model(x, ones, seed=3).loss != plain(x, seed=3).loss
    found, want = (m.log_likelihood(x, 8, c, seed=3) for m, c in ((model, zeros), (plain, None)))
    torch.testing.assert_close(found.value, want.value)


@forms
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_row_is_shared_by_all(form: str, shape: tuple[int, ...]) -> None:
    wrap, shift, _ = FORMS[form]
    model = conditional(shift)
    x = torch.randn(N, D, dtype=torch.float64)
    shared, each = (wrap(torch.full(of, 0.7).double()) for of in (shape, (N, 1)))
    options = {"batch_size": 16, "seed": 3}
    right = model.report(x, condition=each, **options)
    assert model.report(x, condition=shared, **options) == right
    model.objective = fastvae.IWAE(samples=5)
    assert torch.equal(model(x, shared, seed=3).loss, model(x, each, seed=3).loss)


@forms
@pytest.mark.parametrize("rows", [0, N - 1, N + 1])
def test_another_number_of_rows_is_refused(form: str, rows: int) -> None:
    wrap, shift, name = FORMS[form]
    model = conditional(shift)
    x = torch.randn(N, D, dtype=torch.float64)
    wrong = wrap(torch.zeros(rows, 1, dtype=torch.float64))
    model.encoder.shift = lambda condition: torch.zeros(1, 1)  # would not notice
    calls: dict[str, Callable[[], object]] = {
        "report": lambda: model.report(x, condition=wrong),
        "interpolate": lambda: model.interpolate(x, x, condition=wrong),
        "log_likelihood": lambda: model.log_likelihood(x, 8, wrong),
        "IWAE": lambda: fastvae.IWAE(samples=5)(model, x, wrong),
        "Trainer": lambda: Trainer(Settings(), x, CPU, model=model, condition=wrong),
    }
    for method, call in calls.items():
        with pytest.raises(ValueError, match="for each example") as error:
            call()
        assert str(error.value) == (
            f"{name} has shape [{rows}, 1]; want [{N}, ...], a row for each example, or one row "
            "for all"
        ), method


def test_batches() -> None:
    x, one = torch.arange(7), torch.tensor([3])
    condition = {"a": 10 * x, "b": (Label("kept", 100 * x), [one])}
    found = list(conditions.batches(x, condition, 3))
    assert [batch.tolist() for batch, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
    for batch, c in found:
        label, shared = c["b"]
        assert isinstance(label, Label)
        assert label.kind == "kept"
        assert torch.equal(c["a"], 10 * batch)
        assert torch.equal(label.shift, 100 * batch)
        assert shared == [one]


# ---- The trainer ---------------------------------------------------------------------------------


class Watched(Shifted):
    """Data and conditions have their row's number in column 0; these are the rows that were seen
    together."""

    def forward(self, x: Tensor, condition: Any) -> Tensor:
        given = self.shift(condition)
        if x.shape[1] == D:
            assert torch.equal(x[:, 0], given[:, 0])
            self.seen.append(x[:, 0].long().tolist())
        return self.linear(x) + given[:, 1:]


@forms
def test_a_trainer_gives_each_example_its_own_condition(form: str) -> None:
    wrap, shift, _ = FORMS[form]
    encoder, decoder = Watched(D, 2 * L, shift), Watched(L, D, shift)
    encoder.seen = decoder.seen = []
    x, c = torch.rand(N, D), torch.rand(N, 2)
    x[:, 0] = c[:, 0] = torch.arange(N)
    model = fastvae.VAE(encoder, decoder, latent_shape=L)
    settings = Settings(batch_size=16)
    trainer = Trainer(settings, x, CPU, model=model, condition=wrap(c))
    trainer.run_epoch()
    sizes = [len(rows) for rows in encoder.seen]
    assert sizes == [16, 16, 13, 5]  # training, and what is held out
    assert sorted(row for rows in encoder.seen for row in rows) == list(range(N))
    held_out = encoder.seen[-1]
    encoder.seen.clear()
    trainer.report(10)
    assert {row for rows in encoder.seen for row in rows} == set(held_out)
    rolled = Trainer(settings, x, CPU, model=model, condition=wrap(c.roll(1, 0)))
    with pytest.raises(AssertionError):
        rolled.run_epoch()


def test_a_trainer_learns_from_conditions_and_goes_on() -> None:
    """x is its condition and some noise; with another example's, there is less to learn from it."""
    generator = torch.Generator().manual_seed(0)
    c = 3 * torch.randn(400, D, generator=generator)
    x = c + 0.1 * torch.randn(400, D, generator=generator)
    settings = Settings(lr=1e-2, epochs=6)

    def trainer(c: Tensor) -> Trainer:
        torch.manual_seed(0)
        encoder, decoder = Shifted(D, 2 * L, lambda c: 0), Shifted(L, D, lambda c: c["mean"])
        model = fastvae.VAE(encoder, decoder, latent_shape=L)
        return Trainer(settings, x, CPU, model=model, condition={"mean": c})

    whole, other = trainer(c), trainer(c.roll(1, 0))
    for run in (whole, other):
        for _ in range(6):
            run.run_epoch()
    assert whole.history[-1]["heldout_elbo"] > other.history[-1]["heldout_elbo"] + 10
    first, rest = trainer(c), trainer(c)
    for _ in range(3):
        first.run_epoch()
    rest.load_state_dict(first.state_dict())
    for _ in range(3):
        rest.run_epoch()
    for name, value in rest.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])


def test_a_trainer_wants_a_model_with_a_condition() -> None:
    with pytest.raises(ValueError, match="condition is given without a model; want one whose"):
        Trainer(Settings(), torch.rand(N, D), CPU, condition=torch.zeros(N))
