"""The options of `python -m fastvae bench` that choose cases, for `pytest benchmarks/`."""

from __future__ import annotations

from argparse import Namespace

import pytest

from fastvae.bench.command import add_selection, select, select_peers
from fastvae.bench.peers import FUSED, LIMIT


def pytest_addoption(parser: pytest.Parser) -> None:
    add_selection(parser.getgroup("fastvae").addoption)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = Namespace(**vars(metafunc.config.option))
    try:
        cases, names = select(options), [FUSED, LIMIT, *select_peers(options)]
    except ValueError as problem:
        raise pytest.UsageError(str(problem)) from None
    metafunc.parametrize("case", cases, ids=str)
    metafunc.parametrize("name", names)
