"""`python -m fastvae train` on counts: where they come from, and what is drawn and reported."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse
from train_command import FILES, final_state, metrics, refusal, train

from fastvae.training import data
from fastvae.training.counts import Statistics

pytestmark = pytest.mark.usefixtures("folder")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "simulated_counts.py"


def simulate(file: str, *options: str) -> None:
    argv = [str(SCRIPT), file, "--cells", "300", "--genes", "60", *options]
    before, sys.argv = sys.argv, argv
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_a_run_on_counts(likelihood: str, folder: Path) -> None:
    simulate("counts.npz")
    options = ("--data", "counts.npz", "--likelihood", likelihood, "--batch-size", 32, "--lr", 0.01)
    assert train(*options, "--epochs", 30) == 0
    out = folder / "runs" / "counts"
    assert {path.name for path in out.iterdir()} == FILES
    rows = metrics(out)
    assert rows[-1]["heldout_elbo"] > rows[0]["heldout_elbo"]
    report = json.loads((out / "report.json").read_text())
    of_data, of_model = report["counts"]["data"], report["counts"]["model"]
    assert of_data["mean"] == pytest.approx(of_model["mean"], rel=0.25)
    if likelihood != "poisson":  # which cannot vary as much
        assert of_data["zeros"] == pytest.approx(of_model["zeros"], abs=0.15)
        assert of_model["variance"] > 1.5 * of_model["mean"]
    with Image.open(out / "figure.png") as image:
        assert np.asarray(image.convert("L"), dtype=float).std() > 20

    once = final_state(out)
    assert train("--data", "counts.npz", "--resume", "--batch-size", 32, "--epochs", 31) == 0
    assert train(*options, "--epochs", 31) == 0
    assert final_state(out) == final_state(folder / "runs" / "counts-2") != once


def test_where_counts_come_from(folder: Path) -> None:
    simulate("labelled.npz")
    simulate("sparse.npz", "--sparse")
    x = data.load("labelled.npz", counts=True)
    assert x.labels is not None
    assert x.labels.shape == (300,)
    assert torch.equal(data.load("sparse.npz", counts=True).x, x.x)
    np.save("small.npy", x.x.numpy().clip(0, 255).astype(np.uint8))
    assert data.load("small.npy", counts=True).x.max() > 1  # as they are
    assert data.load("small.npy").x.max() <= 1  # grey values
    sparse.save_npz("double.npz", sparse.csc_matrix(x.x.double().numpy()))
    assert torch.equal(data.load("double.npz", counts=True).x, x.x)


def test_an_h5ad_file(folder: Path) -> None:
    anndata = pytest.importorskip("anndata")
    x = np.random.default_rng(0).poisson(1.0, (20, 7)).astype(np.float32)
    logs = anndata.AnnData(np.log1p(x), layers={"counts": sparse.csr_matrix(x)})
    logs.write_h5ad("logs.h5ad")
    assert np.array_equal(data.load("logs.h5ad", counts=True).x, x)
    anndata.AnnData(x).write_h5ad("plain.h5ad")
    assert np.array_equal(data.load("plain.h5ad", counts=True).x, x)


def test_what_is_no_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.ones((9, 4))
    for bad, said in ((0.5, "x has 0.5 in example 7"), (-2, "x has -2 in example 7")):
        np.save("bad.npy", np.where(np.arange(9)[:, None] == 7, bad, x))
        message = refusal(capsys, "--data", "bad.npy", "--likelihood", "nb")
        assert said in message
        assert "want whole numbers of 0 or more for NegativeBinomial" in message
    np.save("ints.npy", x.astype(int))
    message = refusal(capsys, "--data", "ints.npy")
    assert "has dtype int64; want uint8, bool or floating-point, or a likelihood of" in message
    np.save("complex.npy", x.astype(complex))
    assert "want counts" in refusal(capsys, "--data", "complex.npy", "--likelihood", "nb")


def test_statistics() -> None:
    x = torch.tensor([[0.0, 4.0], [2.0, 4.0], [4.0, 4.0], [0.0, 0.0]])
    found = Statistics.of(x)
    assert found.mean.tolist() == [1.5, 3]
    assert found.variance.tolist() == [2.75, 3]
    assert found.zeros.tolist() == [0.5, 0.25]
    assert found.summary() == {"mean": 2.25, "variance": 2.875, "zeros": 0.375}
