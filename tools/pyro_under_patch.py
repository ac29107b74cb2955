"""Pyro's own tests under `fastvae.integrations.pyro.patch()`, in a checkout of its repository:

    PYTHONPATH=.../fastvae/tools python -m pytest -p pyro_under_patch tests/infer/test_gradient.py

With FASTVAE_TORCH_NOISE=1 samples stay PyTorch's, so that tests of estimates from one fixed seed
see the noise that they were written for; all else is served. What was, stands at the end.
"""

from __future__ import annotations

import os
from typing import Any

import fastvae.integrations.pyro
from fastvae.integrations import torch_distributions

if os.environ.get("FASTVAE_TORCH_NOISE"):
    torch_distributions.normal_rsample = lambda self, sample_shape=(): NotImplemented
patch = fastvae.integrations.pyro.patch()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"\n{patch}")
