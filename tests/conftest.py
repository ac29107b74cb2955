"""Options and fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvae import backend, files

try:
    from hypothesis import settings
except ImportError:  # then its tests are left out
    pass
else:
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
    settings.register_profile("fuzz", max_examples=10_000, deadline=None, print_blob=True)
    settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the ops compute: cpu or cuda")


def pytest_report_header(config: pytest.Config) -> str:
    info = backend.info()
    return f"fastvae: {info['backend']} on {config.getoption('device')}, {info['reason']}"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the trainer leave empty ones, because drawing takes most of a short run."""

    def draw(path: Path, *_: object, **__: object) -> None:
        files.write_bytes(path, b"")

    monkeypatch.setattr("fastvae.training.figures.draw", draw)
    monkeypatch.setattr("fastvae.training.sweep._draw", draw)
