"""tools/wheels.py: which Pythons it finds; and of a wheel that it made, what is in it.

FASTVAE_WHEEL=dist/fastvae_kernels-... has the tests look into that wheel.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvae import binaries

TOOL = Path(__file__).parents[1] / "tools" / "wheels.py"
WHEEL = os.environ.get("FASTVAE_WHEEL")

pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="not a source folder")
of_a_wheel = pytest.mark.skipif(not WHEEL, reason="FASTVAE_WHEEL names no wheel")


@pytest.fixture(scope="module")
def tool() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))
        yield runpy.run_path(str(TOOL))


@pytest.fixture
def pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH: this Python as python3.11, and one that does not run."""
    (tmp_path / "python3.11").symlink_to(sys.executable)
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_pythons_that_run_are_found(pythons: Path, tool: dict[str, Any]) -> None:
    tag = "cp{}{}".format(*sys.version_info)
    (found,) = tool["find_pythons"]([])
    assert found.tag == tag
    (named,) = tool["find_pythons"]([str(pythons / "python3.11")])
    assert named == found


@pytest.mark.parametrize("name", ["python3.12", "python3.99"])
@pytest.mark.usefixtures("pythons")
def test_a_python_that_is_asked_for_must_run(name: str, tool: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match=f"{name} does not run"):
        tool["find_pythons"]([name])


@pytest.mark.usefixtures("pythons")
@pytest.mark.parametrize("title", ["", "kernels"])
def test_a_command_that_fails_ends_all(
    title: str, tool: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert tool["run"](sys.executable, "-c", "print(3)", title=title) == "3\n"
    code = "import sys; print('no space'); sys.exit(1)"
    with pytest.raises(SystemExit, match="wheels: failed"):
        tool["run"](sys.executable, "-c", code, title=title)
    said = capfd.readouterr()
    assert "no space" in said.err
    assert ("kernels: 0 s, failed with status 1" in said.out) == bool(title)


@of_a_wheel
def test_a_wheel_has_all_that_its_name_promises() -> None:
    tags = re.search(r"-((cp\d+\.?)+)-none-manylinux_\d+_\d+_\w+\.whl$", str(WHEEL))
    assert tags
    with zipfile.ZipFile(str(WHEEL)) as wheel:
        files = [name for name in wheel.namelist() if name.endswith(".so")]
    modules = [re.fullmatch(r"fastvae/_C\.cpython-(\d+)-.*\.so", name) for name in files]
    assert {f"cp{m[1]}" for m in modules if m} == set(tags[1].split("."))
    pattern = r"fastvae/_nodes\.torch-(\d+\.\d+\.\d+)\.cpython-(\d+)-.*\.so"
    nodes = [m.groups() for name in files if (m := re.fullmatch(pattern, name))]
    releases = {release for release, _ in nodes}
    assert len(nodes) == len(set(nodes)) == len(releases) * len(tags[1].split("."))
    assert len(files) == 1 + len(tags[1].split(".")) + len(nodes)  # and no other
    assert "fastvae/libfastvae.so" in files


@of_a_wheel
def test_a_wheel_has_all_modules_of_the_package() -> None:
    package = binaries.HERE
    with zipfile.ZipFile(str(WHEEL)) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith((".py", "py.typed"))}
    here = [*package.rglob("*.py"), package / "py.typed"]
    assert packed == {path.relative_to(package.parent).as_posix() for path in here}
