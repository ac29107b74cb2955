"""What `fastvae.bench` counts, checks and times; its command line is in test_bench_command.py."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae.bench import check as checks
from fastvae.bench import command, machine, measure, peers, report
from fastvae.bench.cases import DIRECTIONS, OPS, TARGETS, Case, Op, fits
from fastvae.bench.check import WrongResult, check
from fastvae.bench.formulas import Formulas
from fastvae.bench.inputs import Inputs, make_inputs
from fastvae.bench.measure import Effort, Measurement, Spread, checked_program, saved_bytes
from fastvae.bench.peers import FUSED, Program, TorchProgram, function_of, make_program
from fastvae.bench.shapes import SHAPES, Shape

LEVELS = Shape("levels", ((4, 6, 1, 1), (4, 6, 3, 3)), halves=True)
SMALL = (Shape.parse("24x10"), Shape.parse("4x6x5x3"), Shape.parse("6x8x5x3-halves"), LEVELS)
CASES = [Case(op, shape) for op in OPS.values() for shape in SMALL if fits(op, shape)]
MEASURED = [case for case in CASES if not peers.unavailable(FUSED, case)]


def case_of(op: str, shape: str = "24x10", **settings: Any) -> Case:
    return Case(OPS[op], Shape.parse(shape), **settings)


# ---- Bytes at the limit --------------------------------------------------------------------------

N, ROWS = 64 * 16384, 64


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("rsample", 12 * N, 12 * N),
        ("kl_divergence", 8 * N + 4 * ROWS, 16 * N + 4 * ROWS),
        ("kl_divergence:prior", 16 * N + 4 * ROWS, 32 * N + 4 * ROWS),
        ("balanced_kl_divergence", 16 * N + 4 * ROWS, 32 * N + 4 * ROWS),
        ("rsample_kl", 12 * N + 4 * ROWS, 20 * N + 4 * ROWS),
        ("rsample_kl:softplus", 12 * N + 4 * ROWS, 20 * N + 4 * ROWS),
        ("rsample_kl:prior", 20 * N + 4 * ROWS, 36 * N + 4 * ROWS),
        ("rsample_log_ratio", (8 + 50 * 4) * N + 50 * 4 * ROWS, (16 + 50 * 4) * N + 50 * 4 * ROWS),
        ("gaussian_log_prob:sigma", 8 * N + 4 * ROWS, 12 * N + 4 * ROWS),
        ("gaussian_log_prob:scalar", 8 * N + 4 + 4 * ROWS, 12 * N + 8 + 4 * ROWS),
        ("gaussian_log_prob:elementwise", 12 * N + 4 * ROWS, 20 * N + 4 * ROWS),
        ("gaussian_log_prob:weighted", 16 * N + 4 * ROWS, 24 * N + 4 * ROWS),
        ("gaussian_nll_loss:sigma", 12 * N + 4, 0),
        ("gaussian_nll_loss:elementwise", 20 * N + 4, 0),
    ],
)
def test_bytes(op: str, forward: int, backward: int) -> None:
    passes = {d: case_of(op, "64x16384", direction=d).bytes for d in DIRECTIONS}
    assert passes == {"forward": forward, "backward": backward, DIRECTIONS[2]: forward + backward}


def test_bytes_of_other_types_and_shapes() -> None:
    channel = case_of("gaussian_log_prob:channel", "64x3x64x64", direction="forward")
    assert channel.bytes == 8 * 64 * 3 * 64 * 64 + 4 * 3 + 4 * 64
    half = case_of("rsample_kl", "64x16384", direction="forward", dtype=torch.bfloat16)
    assert half.bytes == 6 * N + 4 * ROWS  # sums stay float32
    halves = case_of("rsample", "4x8x64x64-halves", direction="forward")
    assert halves.elements == 4 * 4 * 64 * 64
    assert halves.bytes == 12 * halves.elements
    vdvae = SHAPES["vdvae"]
    assert len(vdvae.sizes) == 43
    elements = 16 * 16 * (1 + 3 * 4**2 + 6 * 8**2 + 11 * 16**2 + 22 * 32**2)
    assert Case(OPS["rsample"], vdvae, direction="forward").bytes == 12 * elements


def test_traffic_reads_as_words() -> None:
    forward, backward = case_of("gaussian_log_prob:sigma").passes
    assert str(forward) == "reads x, mean; writes log_prob"
    assert str(backward) == "reads grad_log_prob, x, mean; writes grad_mean"


def test_targets_are_cases() -> None:
    for op, shape in TARGETS:
        assert fits(OPS[op], SHAPES[shape])


# ---- Results are checked -------------------------------------------------------------------------


@pytest.mark.parametrize("case", MEASURED, ids=str)
@pytest.mark.parametrize("name", [FUSED, "eager", "distributions"])
def test_programs_are_right(case: Case, name: str) -> None:
    if reason := peers.unavailable(name, case):
        pytest.skip(reason)
    checked_program(name, case, make_inputs(case, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "op", [case.op for case in MEASURED if case.shape is SMALL[0]], ids=lambda op: op.name
)
def test_programs_are_right_in_other_types(op: Op, dtype: torch.dtype) -> None:
    case = Case(op, SMALL[0], dtype)
    for name in (FUSED, "eager", "distributions"):
        if not peers.unavailable(name, case):
            checked_program(name, case, make_inputs(case, 0))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "case", [case for case in MEASURED if case.shape in (SMALL[0], LEVELS)], ids=str
)
def test_jax_is_right(case: Case, direction: str) -> None:
    pytest.importorskip("jax")
    case = Case(case.op, case.shape, direction=direction)
    checked_program("jax", case, make_inputs(case, 0))


def test_compiled_program_is_right() -> None:
    case = case_of("kl_divergence")
    inputs = make_inputs(case, 0)
    try:
        checked_program("compile", case, inputs)
    except torch._inductor.exc.InductorError as problem:  # without a compiler
        pytest.skip(str(problem).splitlines()[0])


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: [y * 2 for y in function(*tensors)]


def off_by_a_thousandth(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: [y * 1.001 for y in function(*tensors)]


def nan_in_one_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*tensors: Tensor) -> list[Tensor]:
        outputs = list(function(*tensors))
        outputs[-1] = outputs[-1].clone()
        outputs[-1][-1] = math.nan
        return outputs

    return wrong


def without_gradient_of_logvar(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mu, logvar: function(mu, logvar.detach() + 0 * logvar)


def without_last_row(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: [y[:-1] for y in function(*tensors)]


def sigma_squared(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mu, logvar: (function(mu, 2 * logvar)[0], function(mu, logvar)[1])


def without_noise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mu, logvar: (mu + 0 * logvar, function(mu, logvar)[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (off_by_a_thousandth, "kl is"),
        (nan_in_one_place, "kl is nan"),
        (without_gradient_of_logvar, "the gradient of logvar is"),
        (without_last_row, r"z has shape \[47, 40\]; want \[48, 40\]"),
        (sigma_squared, "the gradient of logvar is"),
        (without_noise, "noise of variance 0; want 1"),
        (twice, "noise of"),
    ],
)
def test_wrong_results_are_refused(spoil: Any, message: str) -> None:
    case = case_of("rsample_kl", "48x40", direction="forward+backward")
    inputs = make_inputs(case, 0)
    right = function_of(Formulas(torch, torch.randn_like), case)

    level = inputs.sets[0][0]

    def results(function: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = list(function(*level.leaves))
        upstream = [g[: len(y)] for g, y in zip(level.upstream, outputs, strict=True)]
        return outputs, list(torch.autograd.grad(outputs, level.leaves, upstream))

    check(case, level, *results(right))
    with pytest.raises(WrongResult, match=message):
        check(case, level, *results(spoil(right)))


def test_rows_at_both_ends_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_ENOUGH", 40)  # two rows of 20 elements
    case = case_of("kl_divergence", "5x20", direction="forward")
    level = make_inputs(case, 0).sets[0][0]
    right = function_of(Formulas(torch, torch.randn_like), case)(*level.leaves).detach()
    for row in (0, 4):
        wrong = right.clone()
        wrong[row] += 1
        with pytest.raises(WrongResult, match="kl is"):
            check(case, level, [wrong], None)


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Formulas.kl_divergence
    monkeypatch.setattr(Formulas, "kl_divergence", lambda *arguments: 1.01 * right(*arguments))
    found = measure.measure(case_of("kl_divergence"), ("eager", "distributions"), command.QUICK)
    assert "WrongResult: kl is" in found.refused["eager"]
    assert set(found.seconds) == {FUSED, "copy", "distributions"}


# ---- What is saved for backward ------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in MEASURED if "loss" not in c.op.outputs], ids=str)
def test_fastvae_saves_the_seed_and_the_logarithms_of_sums(case: Case) -> None:
    program = make_program(FUSED, case, make_inputs(case, 0))
    numbers = len(case.shape.sizes) if case.op.draws else 0
    for rows, *event in case.shape.sizes:
        if case.op.name.startswith("mixture_log_prob"):
            numbers += rows
        if case.op.name == "aggregate_log_prob":  # of all dimensions, and of each
            numbers += rows * (1 + math.prod(event))
    assert saved_bytes(program) == 8 * numbers


@pytest.mark.parametrize("case", [c for c in MEASURED if "loss" in c.op.outputs], ids=str)
def test_the_loss_saves_its_gradients(case: Case) -> None:
    made_in_forward = case.bytes_of(case.passes[0].writes[1:])
    saved = saved_bytes(make_program(FUSED, case, make_inputs(case, 0)))
    assert made_in_forward <= saved <= made_in_forward + 8


def test_what_eager_saves() -> None:
    case = case_of("rsample_kl")
    program = make_program("eager", case, make_inputs(case, 0))
    # std, the noise and exp(logvar) of the KL; mu and logvar are inputs, z is an output
    assert saved_bytes(program) == 3 * 4 * case.elements


def test_saved_storage_counts_once() -> None:
    case = case_of("kl_divergence")

    def function(mu: Tensor, logvar: Tensor) -> Tensor:
        e = logvar.exp()  # saved by exp, and again by each of the products
        return (e[:, :5] * mu[:, :5]).sum(1) + (e[:, 5:] * mu[:, 5:]).sum(1)

    assert saved_bytes(TorchProgram("x", function, make_inputs(case, 0))) == 4 * case.elements


# ---- Timing --------------------------------------------------------------------------------------


class Recorded(Program):
    """Writes down what is called."""

    def __init__(self, name: str, log: list[tuple[str, str, int]]) -> None:
        self.name, self.log = name, log

    def forward(self, k: int) -> int:
        self.log.append((self.name, "forward", k))
        return k

    def backward(self, k: int, recorded: int) -> None:
        assert k == recorded
        self.log.append((self.name, "backward", k))


def count_calls(function: Callable[..., Any], calls: Any) -> float:
    """A clock that takes every call to last one second."""
    for arguments in calls:
        function(*arguments)
    return len(calls)


def turn(name: str, direction: str, sets: int, log: list[Any], clock: Any = None) -> Any:
    inputs = Inputs(((),) * sets, in_cache=False)
    return measure._Turn(Recorded(name, log), direction, inputs, clock or count_calls)


def test_programs_take_turns() -> None:
    log: list[Any] = []
    turns = [turn(name, "forward", 3, log) for name in "AB"]
    found = measure._rounds(turns, Effort(rounds=6))
    assert {name: len(seconds) for name, seconds in found.items()} == {"A": 6, "B": 6}
    assert "".join(name for name, _, _ in log).endswith("AB" * 6)
    assert [k for name, _, k in log if name == "A"][-6:] == [2, 0, 1, 2, 0, 1]  # buffers rotate


def test_a_turn_begins_untimed() -> None:
    batches: list[int] = []

    def clock(function: Callable[..., Any], calls: Any) -> float:
        batches.append(len(calls))
        return count_calls(function, calls) / 100

    found = measure._rounds([turn("A", "forward", 2, [], clock)], Effort(rounds=2, lap=0.08))
    assert batches[-4:] == [2, 8, 2, 8]
    assert len(found["A"]) == 2


def test_a_call_between_passes_is_timed_alone() -> None:
    calls: list[str] = []

    def clock(function: Any, calls_of: Any) -> float:
        calls.append(f"timed {len(calls_of)}")
        function(*calls_of[0])
        return 2.0

    timed = measure._after(lambda: calls.append("network"), clock)
    assert timed(lambda k: calls.append(f"call {k}"), [(0,), (1,)]) == 4.0
    assert calls == ["network", "timed 1", "call 0", "network", "timed 1", "call 1"]


def test_an_idiom_is_held_to_itself() -> None:
    """F.mse_loss is not the op, but must be F.mse_loss; sampling must sample."""
    for name in peers.IDIOMS:
        case = Case(OPS[name], Shape.parse("24x10"))
        checked_program("idiom", case, make_inputs(case, 1 << 20))
    case = Case(OPS["gaussian_nll_loss:sigma"], Shape.parse("24x10"))
    inputs = make_inputs(case, 1 << 20)
    program = make_program("idiom", case, inputs)
    outputs, grads = program.results("forward+backward")
    with pytest.raises(WrongResult):  # as the op it is wrong
        check(case, inputs.sets[0][0], outputs, grads)


def test_backward_is_timed_alone() -> None:
    log: list[Any] = []
    timed: list[str] = []

    def clock(function: Callable[..., Any], calls: Any) -> float:
        timed.append(function.__name__)
        return count_calls(function, calls)

    assert turn("A", "backward", 2, log, clock).seconds(5) == 1
    assert timed == ["backward"] * 3  # no more than two graphs at a time
    assert [what for _, what, _ in log].count("forward") == 5


def test_time_runs_out() -> None:
    fast = measure._rounds([turn("A", "forward", 2, [])], Effort(rounds=50, seconds=0))
    assert len(fast["A"]) == measure._FEWEST_ROUNDS


def test_spread() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    found = Measurement(case_of("rsample"), True, {"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 4.0]})
    assert found.ratio("a", "b") == Spread.of([2, 3, 1])  # of each round, not of the medians


def test_rows_of_two_directions_are_told_apart() -> None:
    seconds = {name: [1.0, 2.0, 3.0] for name in (FUSED, "copy", "eager", "idiom")}
    found = [
        Measurement(case_of("kl_divergence", direction=d), True, seconds, {FUSED: 0})
        for d in ("forward", "forward+backward")
    ]
    for table in (report.markdown(found, ["eager"]), report.idioms_markdown(found)):
        rows = table.splitlines()[2:]
        assert [d for row in rows for d in DIRECTIONS if f"| {d} |" in row] == [
            "forward",
            "forward+backward",
        ]


def test_sets_outgrow_the_cache() -> None:
    case = case_of("rsample", "64x1000")
    each = 3 * 4 * case.elements  # mu, logvar and the gradient of z
    assert len(make_inputs(case, 5 * each).sets) == 10
    assert not make_inputs(case, 5 * each).in_cache
    warm = make_inputs(case, 5 * each, warm=True)
    assert (len(warm.sets), warm.in_cache) == (2, True)
    small = make_inputs(case, 1000 * each)  # which real use finds in cache too
    assert (len(small.sets), small.in_cache) == (2, True)
    first, second = (levels[0].leaves[0] for levels in small.sets)
    assert not torch.equal(first, second)


def test_a_disturbed_case_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.0, 1e9, 0.0, 5e8, 0.0, 0.0])  # processor seconds before and after each time
    monkeypatch.setattr(machine, "seconds_of_others", lambda: next(others))
    effort = Effort(rounds=2, seconds=0, lap=0, patience=60)
    found = measure.measure(case_of("rsample"), (), effort)
    assert found.disturbance == 0
    assert next(others, None) is None  # the third was calm

    others = iter([0.0, 1e9])
    impatient = measure.measure(case_of("rsample"), (), Effort(2, 0, lap=0, patience=0))
    assert impatient.disturbed
    assert "disturbed: others used" in report.line(impatient, ())


@pytest.mark.parametrize(
    ("function", "elements"), [("settle_malloc", 2**20), ("keep_memory", 2**24)]
)
def test_memory_is_kept(function: str, elements: int) -> None:
    code = f"""
import resource, torch
from fastvae.bench import machine
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        outputs = [torch.ones({elements}) for _ in range(3)]
        del outputs
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = max(faults() for _ in range(4))
machine.{function}()
faults()
print(without, min(faults() for _ in range(4)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "want glibc" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    without, kept = map(int, result.stdout.split())
    assert kept < without / 10


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with machine.use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_samples_of_classes_are_checked() -> None:
    """Rare classes may come once; a class that comes too often is found."""
    p = torch.full((4000, 64), 0.02 / 63, dtype=torch.float64)
    p[:, 0] = 0.98
    generator = torch.Generator().manual_seed(0)
    z = torch.eye(64).double()[torch.multinomial(p, 1, generator=generator).squeeze(1)]
    checks._check_one_hot(z, p)
    for rows in range(1, 40):
        checks._check_one_hot(z[:rows], p[:rows])
    for wrong in (z.roll(1, 1), 0.5 * z, torch.eye(64).double().repeat(63, 1)[:4000]):
        with pytest.raises(WrongResult):
            checks._check_one_hot(wrong, p)
