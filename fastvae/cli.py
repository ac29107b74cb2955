"""The command line: `python -m fastvae info`, `audit`, `verify`, `train` and `bench`."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from fastvae import backend

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that it lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m fastvae", description="Fused VAE kernels.")
    parser.add_argument("--version", action="version", version=backend.version())
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what computes here, why, and what was compiled")
    info.add_argument("--json", action="store_true", help="print the same as JSON")
    info.set_defaults(run=_info)
    others = {
        "audit": ("fastvae.auditing.command", "find what is wrong with the loss of a VAE"),
        "verify": ("fastvae.verify", "check identities whose exact answers are known"),
        "train": ("fastvae.training.command", "train a VAE and draw what it learned"),
        "bench": ("fastvae.bench.command", "time the ops against their peers and the limit"),
    }
    for name, (module, summary) in others.items():
        command = commands.add_parser(name, help=summary)
        # Only now: `info` must run, and quickly, where the others' imports are missing.
        if argv[:1] == [name]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.main)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments) or 0


def _info(arguments: argparse.Namespace) -> None:
    report = backend.info()
    print(json.dumps(report, indent=2) if arguments.json else _as_text(report))


def _as_text(report: dict[str, Any]) -> str:
    """The report of `backend.info` in aligned lines."""
    build = report["build"] or {}
    devices = [f"{device['name']} ({device['capability']})" for device in report["cuda_devices"]]
    lines = {
        "fastvae": report["fastvae"],
        "backend": f"{report['backend']} ({report['reason']})",
        "autograd": report["autograd"],
        "compiled with": build.get("compiler", "nothing compiled"),
        "instruction sets": " ".join(build.get("instruction_sets", ["none"])),
        "CUDA archs": " ".join(build.get("cuda_archs") or ["none"]),
        "CUDA toolkit": build.get("cuda_version") or "none",
        "torch built with": build.get("torch_built", "none"),
        "torch running": f"{report['torch']} (CUDA: {report['torch_cuda'] or 'none'})",
        "python": f"{report['python']} on {report['platform']}",
        "CPU": f"{report['cpu_capability'] or 'reference'} kernels, {report['threads']} threads",
        "CUDA devices": ", ".join(devices) or "none visible",
        "to do": "\n".join(report["advice"]) or "nothing",
    }
    width = max(map(len, lines))
    return "\n".join(
        f"{name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2))
        for name, text in lines.items()
    )
