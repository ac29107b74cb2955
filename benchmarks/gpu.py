"""Everything that a machine with a GPU can say about fastvae, in one JSON and one table.

`make gpu` builds in place and runs this: the tests on CUDA, compute-sanitizer on some of them, the
kernels by themselves, small calls as `python -m fastvae bench` times them, and whole training
steps. What is not installed is left out, and the results say so. They go to
benchmarks/results/<device>/, the logs to build/gpu/.

The kernels by themselves: each program is captured in a CUDA graph, a call for every set of inputs,
of which there are more than the L2 cache holds; the graph's replays are timed by events, in turns
with those of the other programs. A copy moves as many bytes as the op must at the least: the limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastvae
from fastvae.bench import check, inputs, machine, peers
from fastvae.bench.cases import DTYPES, OPS, Case
from fastvae.bench.shapes import Shape
from fastvae.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "sanitizer", "kernels", "bench", "steps")
SANITIZED = (
    *(
        f"tests/test_{name}.py"
        for name in (
            *("values", "cuda", "mixtures", "items", "colours", "categoricals"),
            "straight_through",
        )
    ),
    *("-k", "long_rows or several_streams or values_and_gradients and float32"),
)
# 256 MiB a tensor; and rows so few and so short that blocks would be idle.
ELEMENTS = 1 << 26
CASES = [
    (op, f"8192x{ELEMENTS // 8192}", "float32")
    for op in (
        "rsample_kl",
        "kl_divergence",
        "gaussian_log_prob:elementwise",
        "gaussian_log_prob:sigma",
        "gaussian_log_prob:scalar",
        "rsample_kl:prior",
        "rsample",
    )
]
CASES += [
    (op, f"8192x{ELEMENTS // 4096}", "bfloat16")
    for op in ("rsample_kl", "kl_divergence", "gaussian_log_prob:elementwise")
]
CASES += [("rsample_kl", f"64x{ELEMENTS // 64}", "float32"), ("rsample_kl", "65536x64", "float32")]
CASES += [("rsample_kl", "128x20", "float32"), ("gaussian_log_prob:sigma", "128x12288", "float32")]
# What dominates steps, at the sizes of the CPU's table, and where a GPU is full.
CASES += [
    (op, shape, "float32")
    for op, shapes in (
        ("bernoulli_log_prob", ("64x3x64x64",)),
        ("laplace_log_prob:fixed", ("64x3x64x64",)),
        ("discretized_logistic_log_prob", ("64x3x64x64",)),
        ("negative_binomial_log_prob", ("128x10000",)),
        ("zero_inflated_negative_binomial_log_prob", ("128x2000", "128x10000", "8192x8192")),
        ("mixture_log_prob:500", ("128x40",)),
        ("mixture_log_prob:1000", ("256x64", "8192x64")),
        ("aggregate_log_prob", ("256x32", "1024x32")),
        ("multinomial_log_prob", ("512x50000",)),
        ("colour_mixture_log_prob", ("16x3x32x32",)),
        ("straight_through_categorical", ("1024x32x32",)),
        ("balanced_categorical_kl_divergence", ("1024x32x32",)),
    )
    for shape in shapes
]
PEERS = ("eager", "compile", "triton", peers.IDIOM)
SMALL_OPS = ("kl_divergence", "rsample_kl", "gaussian_nll_loss:sigma")


# ---- Tests ---------------------------------------------------------------------------------------


def run(command: Sequence[object], log: Path, **environment: str) -> dict[str, Any]:
    """Runs a command into a log; what it said last."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            check=False,
        ).returncode
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    summary = [line for line in lines if re.search(r"passed|failed|ERROR SUMMARY|RACECHECK", line)]
    last = "; ".join(dict.fromkeys(line.strip("= ") for line in summary[-2:])) or lines[-1]
    print(f"  {last}", flush=True)
    return {"status": status, "summary": last, "seconds": round(time.perf_counter() - start, 1)}


def run_tests(logs: Path) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        return {"status": None, "summary": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", "auto", "--dist", "worksteal"]
    return run(command, logs / "tests.log", OMP_NUM_THREADS="1")


def run_sanitizer(logs: Path) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None or importlib.util.find_spec("pytest") is None:
        return {"status": None, "summary": "compute-sanitizer or pytest is not installed"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--device", "cuda", *SANITIZED]
    return {
        name: run(
            [tool, "--tool", name, "--error-exitcode", "9", *pytest],
            logs / f"{name}.log",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else a tool sees only PyTorch's large pieces
        )
        for name in ("memcheck", "racecheck")
    }


# ---- Kernels -------------------------------------------------------------------------------------


def make_program(name: str, case: Case, sets: inputs.Inputs) -> peers.Program:
    if name != "triton":
        if reason := peers.unavailable(name, case):
            raise NotImplementedError(reason)
        return peers.make_program(name, case, sets)
    if case.op.name != "rsample_kl":
        raise NotImplementedError("written for rsample_kl only")
    sys.path.insert(0, str(Path(__file__).parent))
    from triton_rsample_kl import rsample_kl  # only here: Triton may not be installed

    return peers.TorchProgram(name, rsample_kl, sets)


def checked(program: peers.Program, case: Case, sets: inputs.Inputs) -> None:
    if program.name == peers.LIMIT:
        return
    outputs, grads = program.results(case.direction)
    definition = None if case.op.draws else peers.stands_in(program.name, case)
    check.check(case, sets.sets[0][0], outputs, grads, definition)


def capture(program: peers.Program, case: Case, count: int) -> Callable[[], None]:
    """The replay of a graph with a call for each set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        recorded = [program.record(k) for k in range(count)] if _walks_back(program, case) else []

        def calls() -> None:
            for k in range(count):
                if recorded:  # once before the capture, and once in it
                    torch.autograd.grad(
                        recorded[k], program.wanted[k], program.upstream[k], retain_graph=True
                    )
                elif case.direction == "forward":
                    with torch.no_grad():
                        program.forward(k)
                else:
                    program.both(k)

        for _ in range(3):  # what is set up at first must not be captured
            calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        calls()
    return graph.replay


def _walks_back(program: peers.Program, case: Case) -> bool:
    return case.direction == "backward" and isinstance(program, peers.TorchProgram)


def seconds(replay: Callable[[], None], replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / replays


def kernels_of(function: Callable[[], Any]) -> int | None:
    """How many kernels a call launches, if the profiler can see them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    others = ("cuda", "cuLaunch", "Mem", "Activity")  # calls of the runtime, copies, its own events
    events = [e for e in profile.events() if not e.name.startswith(others)]
    return len(events) or None


def peak_bytes(function: Callable[[], Any]) -> int:
    """What a call allocates at its peak, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    sets = inputs.make_inputs(case, machine.cache_bytes("cuda"))
    count = len(sets.sets)
    replays: dict[str, Callable[[], None]] = {}
    entry: dict[str, Any] = {
        "op": case.op.name,
        "shape": case.shape.name,
        "dtype": case.dtype_name,
        "direction": case.direction,
        "bytes": case.bytes,
        "programs": {},
        "refused": {},
    }
    programs = {}
    for name in (peers.FUSED, peers.LIMIT, *names):
        if name == "compile" and case.direction == "backward":
            continue  # it gives its memory back, and its graph cannot be walked twice
        try:
            program = programs[name] = make_program(name, case, sets)
            checked(program, case, sets)
            replays[name] = capture(program, case, count)
            seconds(replays[name], 1)
        except torch.AcceleratorError as problem:  # nothing runs after one
            raise RuntimeError(f"{name}, {case}") from problem
        except Exception as problem:  # a peer may fail in its own way
            entry["refused"][name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in replays}
    repeats = {n: max(1, round(0.02 / max(seconds(r, 3), 1e-7))) for n, r in replays.items()}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(seconds(replay, repeats[name]) / count)
    for name, values in times.items():
        program = programs[name]
        call = program.forward if case.direction == "forward" else program.both
        # After all replays: the profiler may leave graphs that were captured before it unusable.
        entry["programs"][name] = {
            "kernels": kernels_of(lambda call=call: call(0)),
            "peak_bytes": peak_bytes(lambda call=call: call(0)),
        }
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        copy = statistics.median(times[peers.LIMIT])
        entry["programs"][name] |= {
            "seconds": {"median": median, "low": low, "high": high},
            "gb_per_s": case.bytes / median / 1e9,
            "share_of_copy": copy / median,
        }
    return entry


def run_kernels(
    arguments: argparse.Namespace, old: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """What is known after each case; `old` are of an earlier run, for those left out of this."""
    found = {_name(entry): entry for entry in old}
    for op, shape, dtype in CASES:
        for direction in arguments.directions:
            if not re.search(arguments.only, f"{op} {shape} {dtype} {direction}"):
                continue
            case = Case(OPS[op], Shape.parse(shape), DTYPES[dtype], direction, device="cuda")
            entry = measure(case, arguments.rounds, arguments.peers)
            found[_name(entry)] = entry
            torch.cuda.empty_cache()
            print(_line(entry), flush=True)
            yield [*found.values()]


def noise_has_the_bits_of_the_cpu() -> bool:
    zeros = torch.zeros(1000, 1003)
    on_cpu = fastvae.rsample(zeros, 1.0, param="std", seed=7)
    return torch.equal(on_cpu, fastvae.rsample(zeros.cuda(), 1.0, param="std", seed=7).cpu())


# ---- Results -------------------------------------------------------------------------------------

HEADS = ("op", "shape", "type", "direction", "µs", "GB/s", "of copy", "kernels", "peak, MiB")


def _cells(entry: dict[str, Any]) -> list[str]:
    cells = [entry["op"], entry["shape"], entry["dtype"], entry["direction"]]
    fused = entry["programs"].get(peers.FUSED, {})
    if "seconds" not in fused:
        return [*cells, "refused: " + entry["refused"].get(peers.FUSED, "")]
    time_ = fused["seconds"]["median"]
    cells += [f"{1e6 * time_:.1f}", f"{fused['gb_per_s']:.0f}", f"{fused['share_of_copy']:.1%}"]
    cells += [str(fused["kernels"] or ""), f"{fused['peak_bytes'] / 2**20:.0f}"]
    for name in PEERS:
        peer = entry["programs"].get(name, {})
        cells.append(f"{peer['seconds']['median'] / time_:.2f}" if "seconds" in peer else "")
    return cells


def _name(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(entry[key] for key in ("op", "shape", "dtype", "direction"))


def _line(entry: dict[str, Any]) -> str:
    return "  ".join(f"{cell:>10}" for cell in _cells(entry))


def markdown(document: dict[str, Any]) -> str:
    machine_ = document["machine"]
    lines = [f"# {machine_.get('gpu')}", ""]
    lines += [f"- {machine_['date']}, commit {machine_['commit']}, torch {machine_['torch']}"]
    for name in ("tests", "sanitizer"):
        for what, result in _results(name, document.get(name)):
            lines.append(f"- {what}: {result['summary']}")
    lines.append(f"- float32 noise has the bits of the CPU's: {document['noise_bits_equal']}")
    heads = [*HEADS, *(f"{name} / fastvae" for name in PEERS)]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(_cells(entry))} |" for entry in document.get("kernels", [])]
    if document.get("bench_table"):
        lines += ["", "`python -m fastvae bench --device cuda`, calls and their overhead:", ""]
        lines.append(document["bench_table"])
    if document.get("steps"):
        lines += ["", "`benchmarks/training_steps.py --device cuda`:", "", "```"]
        lines += [document["steps"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _results(name: str, found: Any) -> list[tuple[str, dict[str, Any]]]:
    if not found:
        return []
    return [(name, found)] if "summary" in found else list(found.items())


def run_bench(logs: Path) -> dict[str, Any]:
    """Calls as users make them, of small tensors, where what precedes the kernel is what counts."""
    output, table = logs / "bench.json", logs / "bench.md"
    command = [sys.executable, "-m", "fastvae", "bench", "--device", "cuda", "--seconds", "1"]
    command += ["--ops", *SMALL_OPS, "--shapes", "128x20"]
    command += ["--directions", "forward", "forward+backward", "--peers", "eager", "compile"]
    result = run([*command, "--output", output, "--markdown", table], logs / "bench.log")
    return {
        "bench": json.loads(output.read_text()) if output.is_file() else result,
        "bench_table": table.read_text() if table.is_file() else "",
    }


def run_steps(logs: Path) -> str:
    """Whole training steps; of the hierarchical model no compiled ones, which take many minutes."""
    log = logs / "steps.log"
    command = [sys.executable, "benchmarks/training_steps.py", "--device", "cuda"]
    text = ""
    for models in (
        ("--models", "MLP", "convolutional", "counts"),
        ("--models", "hierarchical", "--no-compile"),
    ):
        run([*command, *models], log, PYTHONWARNINGS="ignore")
        text += log.read_text()
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--directions", nargs="+", default=("forward", "backward", "forward+backward")
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--only", default="", help="kernels: of cases that this pattern matches")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not fastvae.backend.HAS_CUDA:
        print("needs a GPU, and a binary with CUDA kernels", file=sys.stderr)
        return 1
    description = machine.describe("cuda")
    folder = arguments.output or ROOT / "benchmarks" / "results" / machine.name(description)
    logs = ROOT / "build" / "gpu"
    for path in (folder, logs):
        path.mkdir(parents=True, exist_ok=True)
    old = folder / "gpu.json"  # of steps that are not run again
    document: dict[str, Any] = json.loads(old.read_text()) if old.is_file() else {}
    document |= {"format": "fastvae gpu, 1", "machine": description}
    document["noise_bits_equal"] = noise_has_the_bits_of_the_cpu()
    for step in arguments.steps:
        if step == "tests":
            document["tests"] = run_tests(logs)
        elif step == "sanitizer":
            document["sanitizer"] = run_sanitizer(logs)
        elif step == "kernels":
            known = document.get("kernels", [])
            for entries in run_kernels(arguments, known):
                document["kernels"] = entries
                write_json(old, document)
        elif step == "bench":
            document |= run_bench(logs)
        else:
            document["steps"] = run_steps(logs)
        write_json(old, document)
        write_text(folder / "gpu.md", markdown(document))
    print(f"results  {old}\ntable    {folder / 'gpu.md'}")
    results = [r for name in ("tests", "sanitizer") for _, r in _results(name, document.get(name))]
    return int(any(r["status"] for r in results) or not document["noise_bits_equal"])


if __name__ == "__main__":
    sys.exit(main())
