"""`python -m fastvae bench`: what it prints, writes and refuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvae
from fastvae.bench import command, machine, measure, report
from fastvae.bench.cases import OPS, TARGETS, Case
from fastvae.bench.measure import Measurement
from fastvae.bench.peers import FUSED, IDIOMS
from fastvae.bench.shapes import Shape
from fastvae.cli import main


def bench(*options: object) -> int:
    return main(["bench", "--quick", "--shapes", "24x10", *map(str, options)])


def test_idioms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op that has one, beside it; between the passes of a network too."""
    monkeypatch.setattr(command, "QUICK", dataclasses.replace(command.QUICK, rounds=2, lap=0))
    files = ("--output", tmp_path / "results.json", "--markdown", tmp_path / "table.md")
    options = ("--idioms", "--between", "--shapes", "4x6", "--threads", "1")
    assert main(["bench", "--quick", *options, *map(str, files)]) == 0
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert document["effort"]["between"] is True
    assert [(e["op"], e["shape"]) for e in document["cases"]] == [
        (op, "4x6") for op in OPS if op in IDIOMS and not OPS[op].compares
    ]
    for entry in document["cases"]:
        floor = {"floor"} if entry["op"] == "rsample_kl" else set()
        assert set(entry["programs"]) == {FUSED, "copy", "idiom"} | floor
        assert not entry["refused"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[0].endswith("| direction | threads | 4×6 |")
    assert len(table) == 2 + sum(not OPS[op].compares for op in IDIOMS) + 1
    assert any("F.mse_loss" in line for line in table)


def refusal(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *map(str, options)])
    assert stop.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def test_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, figure = tmp_path / "new" / "results.json", tmp_path / "bench.png"
    table = tmp_path / "table.md"
    options = ("--ops", "rsample_kl", "--directions", "all", "--dtypes", "float32", "bfloat16")
    files = ("--output", path, "--figure", figure, "--markdown", table)
    assert bench(*options, "--peers", "eager", *files) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "fastvae bench, 1"
    assert document["effort"]["rounds"] == command.QUICK.rounds
    known = document["machine"]
    for key in ("date", "cpu", "cpu_capability", "cores", "torch", "python", "platform", "backend"):
        assert known[key], key
    assert {"commit", "caches", "jax", "load_before", "compiler"} <= set(known)
    assert len(document["cases"]) == 3 * 3 * 2  # variants, directions, dtypes
    for entry in document["cases"]:
        dtype = getattr(torch, entry["dtype"])
        case = Case(OPS[entry["op"]], Shape.parse("24x10"), dtype, entry["direction"])
        assert (entry["bytes"], entry["elements"]) == (case.bytes, case.elements)
        assert entry["threads"] == torch.get_num_threads()
        assert set(entry["programs"]) == {FUSED, "copy", "eager"}
        for program in entry["programs"].values():
            assert program["rounds"] == command.QUICK.rounds
            seconds = program["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert program["gb_per_s"] == pytest.approx(case.bytes / seconds["median"] / 1e9)
        assert entry["programs"][FUSED]["times_fastvae"]["median"] == 1
        assert entry["programs"]["copy"]["share_of_limit"]["median"] == 1
        assert entry["programs"][FUSED]["saved_bytes"] == 8
        assert entry["programs"]["eager"]["saved_bytes"] > 8
    assert figure.stat().st_size > 10_000
    heads, _, *rows = [line.split(" | ") for line in table.read_text(encoding="utf-8").splitlines()]
    assert heads[:5] == ["| op", "shape", "direction", "dtype", "µs"]
    assert {tuple(row[:4]) for row in rows} == {
        (f"| `{e['op']}`", "24×10", e["direction"], e["dtype"]) for e in document["cases"]
    }
    assert {len(row) for row in rows} == {len(heads)}
    printed = capsys.readouterr().out
    assert "rsample_kl, backward: reads grad_z, grad_kl, mu, logvar" in printed
    assert str(path) in printed
    assert printed.count("24x10") == len(document["cases"])


def test_earlier_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert bench("--ops", "rsample", "--peers") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"fastvae-bench.json", "fastvae-bench-2.json"}


def test_a_folder_gets_a_file_named_after_the_machine(tmp_path: Path) -> None:
    assert bench("--ops", "rsample", "--peers", "--output", tmp_path) == 0
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == machine.name(document["machine"]) + ".json"


def test_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(case: Case, *rest: Any) -> Measurement:
        if case.direction == "backward":
            raise KeyboardInterrupt
        return measure.measure(case, *rest)

    monkeypatch.setattr(command, "measure", interrupted)
    path = tmp_path / "results.json"
    options = ("--ops", "rsample", "--directions", "forward", "backward")
    assert bench(*options, "--peers", "--output", path) == 130
    assert str(path) in capsys.readouterr().err
    assert len(json.loads(path.read_text(encoding="utf-8"))["cases"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ops", "rsampel"), "argument --ops: is 'rsampel'; want all, or some of rsample"),
        (("--shapes", "128"), "argument --shapes: is '128'; want sizes as in 128x20"),
        (("--shapes", "4x3-halves"), "argument --shapes: is '4x3-halves'; want an even second"),
        (("--dtypes", "int8"), "argument --dtypes: is 'int8'; want all, or some of float32"),
        (("--peers", "numpy"), "argument --peers: is 'numpy'; want all, or some of eager"),
        (("--threads", "0"), "argument --threads: is 0; want at least 1"),
        (("--rounds", "0"), "argument --rounds: is 0; want at least 2"),
        (("--ops", "gaussian_log_prob", "--shapes", "vdvae"), "nothing is left to time"),
    ],
)
def test_options_that_are_wrong(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *options).startswith(message)


def test_targets_and_promises() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    cases = command.select(parser.parse_args(["--targets", "--threads", "2"]))
    assert {(case.op.name, case.shape.name) for case in cases} == set(TARGETS)
    found = Measurement(cases[0], False, {FUSED: [1.0] * 3, "copy": [1.0] * 3, "eager": [8.0] * 3})
    assert "8.00 (8.00–8.00) <9" in report.line(found, ["eager"])
    found.seconds["eager"] = [9.0] * 3
    assert report.line(found, ["eager"]).rstrip().endswith("9.00 (9.00–9.00)")


def test_fastvae_wrong_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastvae, "kl_divergence", lambda mu, logvar: (mu + logvar).sum(1))
    assert bench("--output", tmp_path / "a.json", "--ops", "kl_divergence", "--peers") == 1
    assert "fastvae: WrongResult: kl is" in capsys.readouterr().err
