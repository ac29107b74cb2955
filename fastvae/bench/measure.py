"""Times a case: fastvae, the limit and the peers in turns, once their results are checked."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastvae import backend

from . import check, machine, peers
from .cases import Case
from .inputs import Inputs, make_inputs
from .peers import FLOOR, FUSED, IDIOM, LIMIT, Program, TorchProgram

__all__ = ["Effort", "Measurement", "Spread", "checked_program", "measure", "saved_bytes"]

_FEWEST_ROUNDS = 5
_MOST_DISTURBANCE = 0.1  # cores

Clock = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], float]


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: `rounds`, or at least 5 and as many as `seconds` allow."""

    rounds: int = 25
    seconds: float = 6.0
    lap: float = 0.05
    """Seconds that a program computes in a round; a slow one at least one call."""
    patience: float = 15.0
    """Seconds in which a case that others disturbed is timed again; the calmest time counts."""
    keep_memory: bool = False
    """Let malloc keep what is freed: see `machine.keep_memory`."""
    between: bool = False
    """Make each call after a pass of a small network, forward and backward, so that the caches hold
    its code and data, as in training."""
    warm: bool = False
    """Use the same two sets of inputs for every call, instead of more than fit into cache."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Measurement:
    """Of one case."""

    case: Case
    in_cache: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of a call, by program, round by round."""
    saved: dict[str, int] = field(default_factory=dict)
    """Bytes saved for backward, beyond inputs and outputs."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why a program was not timed."""
    disturbance: float | None = None
    """Cores that other processes used meanwhile, if the system says."""

    @property
    def disturbed(self) -> bool:
        """Whether the figures are not the machine's but also its other work's."""
        return (self.disturbance or 0) > _MOST_DISTURBANCE

    def time(self, program: str) -> Spread:
        return Spread.of(self.seconds[program])

    def ratio(self, program: str, to: str) -> Spread:
        """How many times the time of `to` that of `program` is, each compared within its round."""
        pairs = zip(self.seconds[program], self.seconds[to], strict=True)
        return Spread.of([a / b for a, b in pairs])


def measure(
    case: Case,
    wanted: Sequence[str],
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Check and time fastvae and the `wanted` peers. `say` is told what is being done."""
    machine.settle_malloc()
    with machine.use_threads(case.threads):
        inputs = make_inputs(case, machine.cache_bytes(case.device), warm=effort.warm)
        found = Measurement(case, inputs.in_cache)
        programs = []
        for name in (FUSED, LIMIT, *wanted):
            if name in (IDIOM, FLOOR) and peers.unavailable(name, case):
                continue
            say(f"{case}: preparing {name}")
            try:
                program = checked_program(name, case, inputs)
            except Exception as problem:  # a peer may fail in its own way
                found.refused[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
                continue
            if isinstance(program, TorchProgram):
                found.saved[name] = saved_bytes(program)
            programs.append(program)
        say(f"{case}: timing")
        clock = _cuda_clock if torch.device(case.device).type == "cuda" else _cpu_clock
        between = _network(case.device) if effort.between else None
        turns = [_Turn(program, case.direction, inputs, clock, between) for program in programs]
        begin = time.perf_counter()
        while True:
            start, others = time.perf_counter(), machine.seconds_of_others()
            with _without_garbage_collection():
                seconds = _rounds(turns, effort)
            disturbance = None
            if others is not None and (others_after := machine.seconds_of_others()) is not None:
                disturbance = (others_after - others) / (time.perf_counter() - start)
            if found.disturbance is None or (disturbance or 0) < found.disturbance:
                found.seconds, found.disturbance = seconds, disturbance
            if not found.disturbed or time.perf_counter() - begin > effort.patience:
                return found


def checked_program(name: str, case: Case, inputs: Inputs) -> Program:
    """A program whose results for the first set of inputs are right.

    Raises:
        WrongResult: they are not.
        NotImplementedError: the program cannot compute the case.
    """
    if reason := peers.unavailable(name, case):
        raise NotImplementedError(reason)
    program = peers.make_program(name, case, inputs)
    if name == LIMIT:
        return program
    outputs, grads = program.results(case.direction)
    levels = inputs.sets[0]
    for k, level in enumerate(levels):
        check.check(
            case,
            level,
            _share(outputs, k, len(levels)),
            None if grads is None else _share(grads, k, len(levels)),
            None if case.op.draws and name != FLOOR else peers.stands_in(name, case),
        )
    return program


def _share(tensors: Sequence[Tensor], k: int, levels: int) -> Sequence[Tensor]:
    each = len(tensors) // levels
    return tensors[k * each : (k + 1) * each]


def saved_bytes(program: TorchProgram) -> int:
    """Bytes kept from forward for backward that are neither an input nor an output.

    By autograd, or by a node in a way of its own.
    """
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = program.forward(0)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    for node in _graph(outputs):
        own = nodes.kept(node) if (nodes := backend.nodes()) else ()
        for t in (*tree_leaves(getattr(node, "__dict__", {})), *own):
            if isinstance(t, Tensor):
                pack(t)
    for t in (*itertools.chain(*program.leaves[0]), *outputs):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def _graph(outputs: Sequence[Tensor]) -> set[Any]:
    """The nodes of autograd's graph behind `outputs`."""
    found: set[Any] = set()
    left = [y.grad_fn for y in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left.extend(parent for parent, _ in node.next_functions)
    return found


# ---- Time ----------------------------------------------------------------------------------------


def _cpu_clock(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> float:
    start = time.perf_counter()
    for arguments in calls:
        function(*arguments)
    return time.perf_counter() - start


def _cuda_clock(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for arguments in calls:
        function(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _network(device: str) -> Callable[[], None]:
    """A pass through a small network, forward and backward."""
    layers = [torch.nn.Linear(784, 400), torch.nn.ReLU(), torch.nn.Linear(400, 784)]
    network = torch.nn.Sequential(*layers).to(device)
    x = torch.randn(128, 784, device=device)

    def run() -> None:
        network(x).square().sum().backward()
        network.zero_grad()

    return run


def _after(between: Callable[[], None], clock: Clock) -> Clock:
    """Times each call by itself, after something that is not timed."""

    def timed(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> float:
        total = 0.0
        for arguments in calls:
            between()
            total += clock(function, [arguments])
        return total

    return timed


class _Turn:
    """One program, a few calls at a time, each with the next set of inputs."""

    def __init__(
        self,
        program: Program,
        direction: str,
        inputs: Inputs,
        clock: Clock,
        between: Callable[[], None] | None = None,
    ) -> None:
        self.program = program
        self.direction = direction
        self.clock = clock if between is None else _after(between, clock)
        self.order = itertools.cycle(range(len(inputs.sets)))
        self.graphs = 32 if inputs.in_cache else len(inputs.sets)  # recorded at a time

    def seconds(self, calls: int) -> float:
        """Of one call."""
        order = list(itertools.islice(self.order, calls))
        if self.direction != "backward":
            run = self.program.forward if self.direction == "forward" else self.program.both
            return self.clock(run, [(k,) for k in order]) / calls
        total = 0.0
        for start in range(0, calls, self.graphs):
            recorded = [(k, self.program.record(k)) for k in order[start : start + self.graphs]]
            total += self.clock(self.program.backward, recorded)
        return total / calls


def _rounds(turns: Sequence[_Turn], effort: Effort) -> dict[str, list[float]]:
    """Seconds of a call, by program. In each round all take one turn, in the same order."""
    calls = []
    for turn in turns:
        turn.seconds(1)
        seconds = turn.seconds(3)
        most = 30 if effort.between else 2000
        calls.append(max(1, min(most, round(effort.lap / max(seconds, 1e-9)))))
        turn.seconds(calls[-1])
    found: dict[str, list[float]] = {turn.program.name: [] for turn in turns}
    start = time.perf_counter()
    for done in range(effort.rounds):
        if done >= _FEWEST_ROUNDS and time.perf_counter() - start > effort.seconds:
            break
        for turn, count in zip(turns, calls, strict=True):
            # Threads sleep and caches hold another program's data when a turn begins (measured: the
            # first call of rsample_kl at 64x16384 takes 1.5 times as long, the sixth 1.05).
            if count >= 4:
                turn.seconds(count // 4)
            found[turn.program.name].append(turn.seconds(count))
    return found


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
