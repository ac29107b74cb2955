"""Which path computes, what says so, and that a missing or broken binary breaks nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastvae
from fastvae import backend, binaries, cli, cuda_toolkit
from fastvae.advice import advice, newer_source
from fastvae.binaries import SUFFIX
from fastvae.ops.op import OPS

PACKAGE = Path(fastvae.__file__).parent


# An editable installation answers for fastvae._C wherever fastvae itself was found.
NO_EDITABLE_FINDER = """import sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in which `import fastvae` finds the package in `cwd`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTVAE_")}
    return subprocess.run(
        [sys.executable, "-c", NO_EDITABLE_FINDER + code],
        cwd=cwd,
        env=clean | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy_without_binary(tmp_path: Path) -> Path:
    shutil.copytree(
        PACKAGE, tmp_path / "fastvae", ignore=shutil.ignore_patterns("*.so", "_no_binary.txt")
    )
    return tmp_path


def test_the_tests_test_the_kernels(device: torch.device) -> None:
    assert fastvae.info()["backend"] == "native", fastvae.info()["reason"]
    mu = torch.zeros(2, 3, device=device, requires_grad=True)
    assert fastvae.rsample_kl(mu, mu)[0].grad_fn.name() == "RsampleKlBackward"


# ---- use_backend ---------------------------------------------------------------------------------


def test_use_backend_nests_and_restores() -> None:
    def now() -> str:
        return fastvae.info()["backend"]

    assert now() == "native"
    with fastvae.use_backend("reference"):
        assert now() == "reference"
        with fastvae.use_backend("native"):
            assert now() == "native"
        assert now() == "reference"
        with pytest.raises(KeyError), fastvae.use_backend("native"):
            raise KeyError
        assert now() == "reference"
    assert now() == "native"


def test_use_backend_chooses_what_computes() -> None:
    mu = torch.zeros(2, 3, requires_grad=True)
    packed = fastvae.DiagonalGaussian.from_params(torch.zeros(2, 6, requires_grad=True))
    for name, fused in (("reference", False), ("native", True)):
        with fastvae.use_backend(name):
            for _, kl in (fastvae.rsample_kl(mu, mu), packed.rsample_kl()):
                assert (kl.grad_fn.name() == "RsampleKlBackward") == fused


@pytest.mark.parametrize("name", ["cuda", "", None, 1])
def test_use_backend_refuses_unknown_names(name: object) -> None:
    with pytest.raises(
        ValueError, match=r"want one of 'native', 'eager', 'reference', 'compiled'$"
    ):
        fastvae.use_backend(name).__enter__()
    assert fastvae.info()["backend"] == "native"


# ---- The environment -----------------------------------------------------------------------------

SAMPLE = "import fastvae, torch; print(fastvae.rsample(torch.zeros(2), 0.0, seed=1).tolist());"
STATE = "i = fastvae.info(); print(i['backend']); print(i['reason']); print(*i['advice'])"


def test_environment_chooses_the_reference() -> None:
    done = run(SAMPLE + STATE, PACKAGE.parent, FASTVAE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "\nreference\nchosen by FASTVAE_BACKEND" in done.stdout
    assert "RuntimeWarning" not in done.stderr


def test_environment_refuses_unknown_names() -> None:
    done = run("import fastvae", PACKAGE.parent, FASTVAE_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: FASTVAE_BACKEND is 'fast'; want one of 'native', 'eager'" in done.stderr


# ---- Without a binary ----------------------------------------------------------------------------


NATIVE = """
try:
    with fastvae.use_backend("native"):
        pass
except RuntimeError as error:
    print(error)
"""


def assert_falls_back(where: Path, reason: str) -> None:
    done = run(f"{SAMPLE}{STATE}{NATIVE}", where)
    assert done.returncode == 0, done.stderr
    sample, name, said, *advised, refused = done.stdout.splitlines()
    assert name == "eager"
    assert said.startswith(reason)
    assert refused.startswith(f"use_backend('native') is not possible: {reason}")
    assert "rebuild" in advised[-1]
    assert done.stderr.count("RuntimeWarning: fastvae runs without its kernels") == 1
    assert reason in done.stderr
    ours = fastvae.rsample(torch.zeros(2), 0.0, seed=1).tolist()
    assert json.loads(sample) == pytest.approx(ours, rel=1e-6)


def test_missing_binary(copy_without_binary: Path) -> None:
    assert_falls_back(copy_without_binary, "no binary was built: the extension was never compiled")


def test_missing_binary_with_a_record_of_why(copy_without_binary: Path) -> None:
    (copy_without_binary / "fastvae" / "_no_binary.txt").write_text("no compiler\n")
    assert_falls_back(copy_without_binary, "no binary was built: no compiler")


def test_broken_binary(copy_without_binary: Path) -> None:
    (copy_without_binary / "fastvae" / f"_C{SUFFIX}").write_bytes(b"not a library")
    assert_falls_back(copy_without_binary, "the binary does not load: ImportError")


def test_binary_for_another_python(copy_without_binary: Path) -> None:
    for python in ("cpython-27-pdp11", "cpython-26-pdp11"):
        (copy_without_binary / "fastvae" / f"_C.{python}.so").write_bytes(b"")
    assert_falls_back(
        copy_without_binary,
        "the binary does not load: it is for other Pythons, cpython-26-pdp11, cpython-27-pdp11",
    )


def test_binary_without_its_kernels(copy_without_binary: Path) -> None:
    """The module that tells of them is there, the library is not."""
    (module,) = PACKAGE.glob(f"_C{SUFFIX}")
    shutil.copy(module, copy_without_binary / "fastvae")
    library = copy_without_binary / "fastvae" / "libfastvae.so"
    assert_falls_back(
        copy_without_binary, f"the binary does not load: ImportError: {library}: cannot open"
    )


# ---- Which nodes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "served_by"),
    [
        ("2.13.0", "2.13.0"),
        ("2.13.0+cpu", "2.13.0"),
        ("2.13.0+cu130", "2.13.0"),
        ("2.13.1+cu130", "2.13.1"),
        ("2.13.0+rocm7.1", "2.13.0+rocm7.1"),
        ("2.13.0rc1+cu130", "2.13.0rc1+cu130"),
        ("2.13.0a0+git01ab", "2.13.0a0+git01ab"),
        ("2.14.0.dev20261001+cpu", "2.14.0.dev20261001+cpu"),
    ],
)
def test_which_torches_share_their_nodes(running: str, served_by: str) -> None:
    assert binaries.torch_abi(running) == served_by


NODES = """
import torch
torch.__version__ = {torch!r}
import fastvae
mu = torch.zeros(2, 3, requires_grad=True)
fastvae.rsample_kl(mu, mu)
info = fastvae.info()
print(info["backend"], info["autograd"], *info["advice"], sep="\\n")
"""


@pytest.mark.skipif(not backend.nodes(), reason="the library of nodes is not there")
def test_nodes_are_chosen_by_the_torch_that_runs(copy_without_binary: Path) -> None:
    """Of several the one of this release, whatever its local version; no other's is even opened."""
    package = copy_without_binary / "fastvae"
    release = torch.__version__.partition("+")[0]
    for path in (*PACKAGE.glob(f"_C{SUFFIX}"), PACKAGE / "libfastvae.so"):
        shutil.copy(path, package)
    for other in ("2.98.0", "2.99.1"):
        (package / binaries.nodes_file(other)).write_bytes(b"not a library")

    def autograd(version: str) -> list[str]:
        done = run(NODES.format(torch=version), copy_without_binary)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("native\n")
        return done.stdout.splitlines()[1:]

    assert autograd(release)[0] == "Python nodes (built for torch 2.98.0, 2.99.1)"
    shutil.copy(PACKAGE / binaries.nodes_file(release), package)
    for version in (release, f"{release}+cpu", f"{release}+cu999"):
        assert autograd(version) == ["C++ nodes (built for this torch)"]
    for version in ("2.99.0", f"{release}+rocm7.1", f"{release}a0"):
        said, advised = autograd(version)
        assert said == f"Python nodes (built for torch {release}, 2.98.0, 2.99.1)"
        assert advised.startswith("calls cost less with autograd's nodes for this torch; rebuild")
    # The negative control: what is chosen is loaded, and may fail without harm.
    assert autograd("2.99.1+cpu")[0].startswith("Python nodes (ImportError: ")


def test_info_says_what_to_do_without_a_binary(copy_without_binary: Path) -> None:
    code = "import sys; from fastvae.cli import main; sys.exit(main(['info', '--json']))"
    done = run(code, copy_without_binary, FASTVAE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["build"] is None
    assert report["advice"] == ["compile it; " + report["advice"][0].partition("; ")[2]]
    assert done.stderr == ""  # the reference was asked for


# ---- info ----------------------------------------------------------------------------------------


def test_info_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == fastvae.info()
    assert report["build"]["compiler"]
    assert report["build"]["torch_built"]
    assert report["cpu_capability"] in report["build"]["instruction_sets"]
    assert report["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()


def test_info_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "native (the binary loaded)" in text
    assert torch.__version__ in text


@pytest.fixture
def built_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has been edited here since the binary was built."""
    monkeypatch.setattr(sys.modules[advice.__module__], "newer_source", lambda here: None)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ("9.0", ["8.0", "9.0"], True),
        ("8.9", ["8.0"], True),
        ("8.0", ["8.6"], False),
        ("9.0", ["8.0"], False),
        ("12.1", ["9.0", "12.0+PTX"], True),
        ("13.0", ["12.0+PTX"], True),
        ("7.5", ["8.0", "12.0+PTX"], False),
        ("9.0", ["9.0a"], True),
    ],
)
@pytest.mark.usefixtures("built_now")
def test_advice_about_architectures(capability: str, archs: list[str], runs: bool) -> None:
    devices = [{"name": "GPU", "capability": capability}]
    found = advice({"cuda_archs": archs}, devices)
    assert (found == []) == runs
    if not runs:
        assert f"TORCH_CUDA_ARCH_LIST={capability}" in found[0]


@pytest.mark.parametrize("has_nvcc", [False, True])
@pytest.mark.usefixtures("built_now")
def test_advice_about_a_binary_without_cuda(
    has_nvcc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: "nvcc" if has_nvcc else None)
    build = {"cuda_archs": None}
    (found,) = advice(build, [{"name": "GPU", "capability": "9.0"}])
    assert "rebuild in the source folder: pip install" in found
    assert ("pip install 'nvidia-cuda-nvcc==13.0.*'" in found) == (not has_nvcc)
    assert advice(build, []) == []


def test_a_folder_that_shadows_the_installed_package(
    copy_without_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = tmp_path_factory.mktemp("site")
    metadata = site / "fastvae_kernels-9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: fastvae-kernels\nVersion: 9.0\n")
    (site / "fastvae").mkdir()
    (site / "fastvae" / "_C.so").touch()
    # Before whatever is installed where the tests run.
    code = f"""
at = next((i for i, p in enumerate(sys.path) if p.endswith("-packages")), len(sys.path))
sys.path.insert(at, {str(site)!r})
import fastvae
print(*fastvae.info()["advice"])
"""
    said = run(code, copy_without_binary, FASTVAE_BACKEND="reference").stdout
    assert said.startswith(f"{copy_without_binary / 'fastvae'} shadows the installed package, ")
    assert "run from another folder, or build here: python setup.py build_ext --inplace" in said
    assert "compiler" not in said


def test_a_binary_older_than_its_sources(tmp_path: Path) -> None:
    package, source = tmp_path / "fastvae", tmp_path / "csrc" / "cpu" / "loops.h"
    for folder in (package, source.parent):
        folder.mkdir(parents=True)
    assert newer_source(package) is None
    source.touch()
    (package / "_C.so").touch()
    os.utime(source, (1, 1))
    assert newer_source(package) is None
    os.utime(package / "_C.so", (0, 0))
    assert newer_source(package) == str(Path("csrc/cpu/loops.h"))
    build = {"cuda_archs": None}
    (found,) = advice(build, [], here=package)
    assert found.startswith("the binary is older than its sources, such as csrc/cpu/loops.h; re")


@pytest.mark.parametrize("settings", [["event_ndim"], None], ids=["other settings", "no operator"])
def test_a_binary_of_another_version(
    settings: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no part in what it would get wrong, and says so."""
    op = OPS["poisson_log_prob"]
    monkeypatch.setattr(backend, "_lacking", [])
    if settings is None:
        monkeypatch.setattr(op, "name", "poisson_log_density")
    else:
        schema = SimpleNamespace(operands=["x", "rate"], settings=settings)
        monkeypatch.setattr("fastvae.ops.op.Schema", lambda kernel: schema)
    with pytest.warns(RuntimeWarning, match="binary is not of this version: without kernels for"):
        monkeypatch.setattr(op, "_kernels", op._find_kernels())
    assert fastvae.info()["advice"][-1] == f"until then the eager path computes {op.name}"
    x = torch.ones(2, 3)
    right = fastvae.reference.poisson_log_prob(x, x)
    torch.testing.assert_close(op.run(*op.request(x, x)), right)


def test_a_processor_without_kernels() -> None:
    code = """
import torch, fastvae
from fastvae import backend
mu = torch.zeros(2, 3)
torch.manual_seed(3)
z = fastvae.rsample(mu, 0.0)
torch.manual_seed(3)
print(backend.path(mu), torch.equal(z, torch.randn(2, 3)), *fastvae.info()["advice"])
"""
    done = run(code, PACKAGE.parent, FASTVAE_CPU_CAPABILITY="none")
    assert done.stdout.startswith("eager True CPU tensors take the eager path"), done.stderr
