"""Options and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import threading
import time
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


class SlowTests:
    """Names a test that takes long, every few seconds, so that nobody waits in front of nothing."""

    EVERY = 8.0

    def __init__(self) -> None:
        self.output = os.dup(1)  # which pytest sends elsewhere while a test runs
        self.running, self.begin = "", 0.0
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running, self.begin = nodeid.rpartition("/")[2], time.monotonic()

    def pytest_unconfigure(self) -> None:
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(self.EVERY):
            seconds = time.monotonic() - self.begin
            if self.running and seconds >= self.EVERY / 2:
                os.write(self.output, f"\n{self.running}: {seconds:.0f} s ".encode())


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SlowTests())


def pytest_collection_finish() -> None:
    """What is there by now stays: to search it for cycles took a twentieth of all time."""
    gc.collect()
    gc.freeze()


# A process computes a file; the longest last would leave the other processes idle.
LONGEST = (
    *("test_cuda_on_host.py", "test_gradients.py", "test_train.py", "test_examples.py"),
    *("test_cuda_resources.py", "test_distributed.py", "test_soak.py"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What never asks for the device says nothing about another than the CPU."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if config.getoption("device") != "cpu":
        asks = ["device" in getattr(item, "fixturenames", ()) for item in items]
        others = [item for item, wanted in zip(items, asks, strict=True) if not wanted]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item, wanted in zip(items, asks, strict=True) if wanted]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """What a test makes without a word about the device lies there too."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield


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
