"""Every public name is in the reference, and links lead somewhere. `make docs` checks the rest."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fastvae
import fastvae.integrations
import fastvae.models

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"

# What modules of the package give each other, and nobody else.
INTERNAL = {"check_not_negative", "check_positive"}


def modules() -> Iterator[ModuleType]:
    """Whose `__all__` is public."""
    for name in ("", ".auditing", ".debug", ".distributed", ".reference", ".verify"):
        yield importlib.import_module("fastvae" + name)
    for package in (fastvae.models, fastvae.integrations):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(module.name)


def public() -> dict[str, object]:
    """All public names, and what they are."""
    internal = {"fastvae.verify": {"CHECKS", "add_arguments", "main"}}  # its command line
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules()
        for name in getattr(module, "__all__", ())
        if name not in INTERNAL | internal.get(module.__name__, set())
    }


def resolve(name: str) -> object:
    """What a dotted name stands for."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        owner, _, attribute = name.rpartition(".")
        return getattr(resolve(owner), attribute)


def documented(pages: str) -> list[object]:
    """What the directives of pages of the reference document."""
    found = []
    for kind, name, options in re.findall(
        r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", pages, re.MULTILINE
    ):
        found.append(resolve(name))
        if kind == "module" and ":members:" in options:
            found += [getattr(found[-1], name) for name in found[-1].__all__]
    return found


def missing(pages: str) -> list[str]:
    """Public names that pages do not have. One under several names is wanted once."""
    known = {id(thing) for thing in documented(pages)}
    return [name for name, thing in public().items() if id(thing) not in known]


@pytest.fixture(scope="module")
def pages() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(REFERENCE.glob("*.md")))


def test_every_public_name_is_in_the_reference(pages: str) -> None:
    assert missing(pages) == []


def test_a_name_that_is_left_out_is_missed(pages: str) -> None:
    without = pages.replace(".. autofunction:: fastvae.rsample_kl\n", "")
    assert missing(without) == ["fastvae.rsample_kl"]
    without = pages.replace(".. automodule:: fastvae.integrations.scvi\n   :members:\n", "")
    assert "fastvae.integrations.scvi.patch" in missing(without)


def broken(page: Path, text: str) -> list[str]:
    """Links of a page to files that are not there."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        assert broken(page, page.read_text(encoding="utf-8")) == [], page
    assert broken(ROOT / "README.md", "[here](docs/nowhere.md)") == ["docs/nowhere.md"]
