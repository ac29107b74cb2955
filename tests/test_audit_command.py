"""`python -m fastvae audit`, and what docs/audit.md shows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastvae.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "audit.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_documented_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, printed = blocks("python")[0], blocks("text")[0]
    (folder / "vae.py").write_text(program, encoding="utf-8")
    assert main(["audit", "vae.py"]) == 1
    assert capsys.readouterr().out == printed

    right = program.replace("torch.exp(logvar)", "torch.exp(0.5 * logvar)")
    right = right.replace(
        "torch.mean(0.5 * (mu**2 + logvar.exp() - 1 - logvar))",
        "(0.5 * (mu**2 + logvar.exp() - 1 - logvar)).sum(dim=1).mean()",
    )
    (folder / "vae.py").write_text(right, encoding="utf-8")
    assert main(["audit", "vae.py"]) == 0
    assert "no fault was found" in capsys.readouterr().out


def test_every_kind_is_documented() -> None:
    sources = Path(__file__).parent.parent / "fastvae" / "auditing"
    text = "".join(path.read_text(encoding="utf-8") for path in sources.glob("*.py"))
    kinds = set(
        re.findall(r'"((?:kl|likelihood|noise|sigma|logvar|decoder|not|no)-[a-z-]+)"', text)
    )
    assert len(kinds) > 20
    assert {kind for kind in kinds if f"`{kind}`" not in PAGE} == set()


def test_a_module_with_make_and_a_loss(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "made_here.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.e, self.d = nn.Linear(6, 8), nn.Linear(4, 6)\n"
        "    def forward(self, x):\n"
        "        mu, s = self.e(x).chunk(2, 1)\n"
        "        return self.d(mu + s.exp() * torch.randn_like(mu)), mu, s\n"
        "def loss(model, x):\n"
        "    y, mu, s = model(x)\n"
        "    kl = (0.5 * (mu**2 + (2 * s).exp() - 1) - s).sum(1)\n"
        "    return (3 * kl + (x - y).square().sum(1)).mean()\n"
        "def make():\n"
        "    return Model(), torch.rand(9, 6), loss\n"
    )
    assert main(["audit", "made_here", "--beta", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["effective_beta"] == pytest.approx(3.0)
    assert report["latents"][0]["carrier"] == "log_std"
    assert main(["audit", "made_here", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    [finding] = report["findings"]
    assert finding["kind"] == "kl-weight"
    assert finding["line"] == 12
    assert finding["file"].endswith("made_here.py")


def test_what_is_no_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.py").write_text("x = 1\n")
    assert main(["audit", "empty.py"]) == 2
    assert "no `model`" in capsys.readouterr().err
    assert main(["audit", "nowhere_at_all"]) == 2
    assert "nowhere_at_all" in capsys.readouterr().err
