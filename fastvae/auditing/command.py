"""`python -m fastvae audit FILE_OR_MODULE`: see `fastvae.audit`.

The file, or module, has `model` and `x`, or a function `make()` that returns them, as a tuple or a
dict; and, if they are wanted, `loss` and `beta`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .auditor import audit

__all__ = ["add_arguments", "main"]

_NAMES = ("model", "x", "loss", "beta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m fastvae audit`."""
    parser.add_argument(
        "program",
        metavar="FILE_OR_MODULE",
        help="has `model` and `x`, or make() that returns them; and `loss(model, x)` and `beta`, "
        "if they are wanted",
    )
    parser.add_argument("--beta", type=float, help="the weight that the KL is meant to have")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print the report, and return 0 if no fault was found, 1 if one was, 2 if nothing was run."""
    try:
        given = _given(_load(arguments.program))
    except (ImportError, OSError, TypeError) as error:
        print(f"python -m fastvae audit: {error}", file=sys.stderr)
        return 2
    if arguments.beta is not None:
        given["beta"] = arguments.beta
    report = audit(**given)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(report)
    return 0 if report.ok else 1


def _load(program: str) -> ModuleType:
    path = Path(program)
    if not path.is_file():
        sys.path.insert(0, "")
        return importlib.import_module(program.replace("/", "."))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{program} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as if it were run
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _given(module: ModuleType) -> dict[str, Any]:
    """The arguments of `audit`."""
    make = getattr(module, "make", None)
    if callable(make):
        made = make()
        found = dict(made) if isinstance(made, dict) else dict(zip(_NAMES, made, strict=False))
    else:
        found = {name: vars(module)[name] for name in _NAMES if name in vars(module)}
    if not isinstance(found.get("model"), nn.Module) or found.get("x") is None:
        raise TypeError(
            f"{module.__name__} has no `model` (a torch.nn.Module) and `x` (a batch), and no "
            "make() that returns them"
        )
    return {name: found[name] for name in _NAMES if name in found}
