"""`python -m fastvae train`: the data it takes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_command import FILES, refusal, train

from fastvae.training import data

pytestmark = pytest.mark.usefixtures("folder")


# ---- Data ----------------------------------------------------------------------------------------


def test_arrays_and_folders_of_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(20, 6, 5, 3), dtype=np.uint8)
    np.savez("named.npz", x_train=images, y_train=np.arange(20) % 2)
    np.save("grey.npy", images[..., 0] / 255)
    np.savez("single.npz", anything=images[:, 0, :, 0] > 128)
    for i, image in enumerate(images):
        path = folder / "pictures" / ("even", "odd")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    named, grey = data.load("named.npz"), data.load("grey.npy")
    torch.testing.assert_close(named.x, torch.from_numpy(images / np.float32(255)))
    torch.testing.assert_close(grey.x, named.x[..., 0])
    assert grey.labels is None
    assert data.load("single.npz").x.unique().tolist() == [0, 1]
    pictures = data.load("pictures")
    torch.testing.assert_close(pictures.x, torch.cat([named.x[::2], named.x[1::2]]))
    assert pictures.labels is not None
    assert pictures.labels.tolist() == ["even"] * 10 + ["odd"] * 10

    for name in ("named.npz", "single.npz", "pictures"):
        for latent in (1, 2):
            out = f"{name}-{latent}"
            assert train("--data", name, "--epochs", 1, "--latent-dim", latent, "--out", out) == 0
            assert {path.name for path in Path(out).iterdir()} == FILES


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9), r"has shape [9]; want [N, D]"),
        (np.zeros((1, 9)), r"has shape [1, 9]; want [N, D]"),
        (np.zeros((9, 0)), r"has shape [9, 0]; want [N, D]"),
        (np.zeros((9, 2, 2, 7)), r"has shape [9, 2, 2, 7]; want [N, D]"),
        (np.zeros((9, 4), int), "has dtype int64; want uint8, bool or floating-point"),
        (np.zeros((9, 4), complex), "has dtype complex128; want"),
        (np.array([[1, 2], [3, np.nan]]), "NaN or infinite values in 1 of 2 examples, the first"),
        (np.full((9, 4), 1e300), "NaN or infinite values in 9 of 9 examples"),
        (np.array([{}, {}], dtype=object), "is not readable; want an .npz or .npy file"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("bad.npy", array)
    printed = refusal(capsys, "--data", "bad.npy")
    assert printed.startswith("argument --data: ")
    assert "bad.npy" in printed
    assert message in printed
    assert not Path("runs").exists()


def test_bad_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.npz' does not exist; want" in refusal(capsys, "--data", "nowhere.npz")
    (folder / "text.npz").write_text("text")
    assert "text.npz is not readable; want" in refusal(capsys, "--data", "text.npz")
    np.savez("two.npz", a=np.zeros((9, 4)), b=np.zeros(9))
    assert "arrays ['a', 'b']; want one named 'x'" in refusal(capsys, "--data", "two.npz")
    np.savez("labels.npz", x=np.zeros((9, 4)), y=np.zeros(8))
    assert "labels of shape [8]; want [9]" in refusal(capsys, "--data", "labels.npz")
    (folder / "images").mkdir()
    assert "images holds no images; want files .png" in refusal(capsys, "--data", "images")
    for size in (4, 5):
        Image.new("L", (size, 4)).save(folder / "images" / f"{size}.png")
    assert "has shape [4, 5], 4.png has [4, 4]" in refusal(capsys, "--data", "images")


# ---- Wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "argument --epochs: is '0'; want a whole number above 0"),
        (("--latent-dim", 1.5), "argument --latent-dim: is '1.5'; want a whole number above 0"),
        (("--sigma", "nan"), "argument --sigma: is 'nan'; want a number above 0, or learned"),
        (("--lr", "inf"), "argument --lr: is 'inf'; want a number above 0"),
        (("--beta", -1), "argument --beta: is '-1'; want a number of at least 0"),
        (("--seed", 2**63), "argument --seed: is '9223372036854775808'; want"),
        (("--device", "abacus"), "argument --device: is 'abacus'; want a device of this machine"),
        (("--device", "meta"), "argument --device: is 'meta'; want a device of this machine"),
        (("--backend", "fast"), "argument --backend: invalid choice: 'fast'"),
        (("--layers", -1), "argument --layers: is '-1'; want a whole number of at least 0"),
        (("--sigma", "tiny"), "argument --sigma: is 'tiny'; want a number above 0, or learned, "),
        (("--prior", "flat"), "argument --prior: invalid choice: 'flat'"),
        (("--objective", "iwae", "--beta", 2), "objective iwae has no weighted KL; want no beta"),
        (("--objective", "stl", "--warmup", 2), "objective stl has no weighted KL; want no beta"),
        (("--capacity", 2, "--free-bits", 1), "capacity and free bits are both given; want one"),
        (("--free-bits", 1, "--prior", "vamp"), "free bits need the KL of each latent dimension"),
        (("--likelihood", "bernoulli", "--sigma", "optimal"), "sigma is optimal, likelihood bern"),
        (("--cycles", 2), "cycles are given without a warm-up; want the epochs of one ramp too"),
        (
            ("--sweep-beta", 1, "--sweep-samples", 2),
            "argument --sweep-samples: --sweep-beta is given; want one of them",
        ),
        (("--resume", "--sweep-beta", 1), "argument --resume: no run of digits-sweep-beta"),
        (("--resume",), "argument --resume: no run of digits in runs; want --out"),
        (("--resume", "--out", "x"), "argument --resume: x/checkpoint.pt does not exist; want"),
    ],
)
def test_bad_options(
    options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *options).startswith(message)
    assert not Path("runs").exists()


def test_bad_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.eye(8))
    assert train("--epochs", 2, "--data", "a.npy", "--out", "run") == 0
    before = (folder / "run/checkpoint.pt").read_bytes()

    def resumed(*options: object) -> str:
        return refusal(capsys, "--resume", "--out", "run", *options)

    assert "argument --latent-dim: is 4; want the resumed run's 3" in resumed("--latent-dim", 4)
    assert "argument --hidden: is 64; want the resumed run's 32" in resumed("--hidden", 64)
    assert "argument --sigma: is 0.5; want the resumed run's 0.2" in resumed("--sigma", 0.5)
    assert "argument --data: is digits; want the resumed run's" in resumed("--data", "digits")
    assert "argument --epochs: is 1; want at least the resumed run's 2" in resumed("--epochs", 1)
    np.save("a.npy", 2 * np.eye(8))
    assert "has shape and checksum [8, 8]" in resumed()
    assert (folder / "run/checkpoint.pt").read_bytes() == before
    (folder / "run/checkpoint.pt").write_bytes(before[:1000])
    assert "run/checkpoint.pt is damaged or no checkpoint" in resumed()
    torch.save({"weights": torch.zeros(2)}, folder / "run/checkpoint.pt")
    assert "no checkpoint of this version" in resumed()


def test_native_backend_without_a_binary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastvae.backend._binary", None)
    assert refusal(capsys, "--backend", "native").startswith("argument --backend: use_backend")


def test_missing_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tqdm" else name)
    printed = refusal(capsys)
    assert printed == "not installed: tqdm; want pip install 'fastvae-kernels[train]'\n"
