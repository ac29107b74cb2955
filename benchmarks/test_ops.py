"""Every case under pytest-benchmark: pytest benchmarks/ --shapes 128x20 --benchmark-group-by=group

The cases, their peers, inputs and checks are those of `python -m fastvae bench`. There the programs
take turns, so a ratio is that command's to give; here are the statistics of each alone, and
`--benchmark-save` and `--benchmark-compare` for before and after a change.
"""

from __future__ import annotations

import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastvae.bench import machine
from fastvae.bench.cases import Case
from fastvae.bench.inputs import make_inputs
from fastvae.bench.measure import checked_program


def test_op(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    inputs = make_inputs(case, machine.cache_bytes(case.device))
    benchmark.group = str(case)
    benchmark.extra_info.update(elements=case.elements, bytes=case.bytes)
    with machine.use_threads(case.threads):
        try:
            program = checked_program(name, case, inputs)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        order = itertools.cycle(range(len(inputs.sets)))
        if case.direction == "backward":

            def recorded() -> tuple[tuple[int, object], dict[str, object]]:
                k = next(order)
                return (k, program.record(k)), {}

            benchmark.pedantic(program.backward, setup=recorded, rounds=50, warmup_rounds=5)
        else:
            run = program.forward if case.direction == "forward" else program.both
            benchmark(lambda: run(next(order)))
