"""`python -m fastvae train`: the data it takes, and what it refuses."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_command import FILES, final_state, refusal, train

from fastvae.training import checkpoint, data
from fastvae.training.settings import Settings
from fastvae.training.trainer import Trainer

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
    scaled = torch.from_numpy(images / np.float32(255))
    torch.testing.assert_close(named.x, scaled.movedim(-1, 1))
    torch.testing.assert_close(grey.x, scaled[..., 0])
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


def test_damaged_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez_compressed("flate.npz", x=np.random.default_rng(0).random((50, 40)))
    content = bytearray((folder / "flate.npz").read_bytes())
    content[500:510] = b"\xff" * 10
    (folder / "flate.npz").write_bytes(content)
    assert "flate.npz, array 'x' is not readable; want" in refusal(capsys, "--data", "flate.npz")

    np.savez("sparse.npz", format=np.array(b"csr"), shape=np.array([3, 3]), data=np.ones(3))
    assert "sparse.npz is not readable; want" in refusal(capsys, "--data", "sparse.npz")

    with zipfile.ZipFile("faces.zip", "w") as archive:
        archive.writestr("faces/1.png", b"a picture")
    assert "faces.zip holds no arrays; want an .npz" in refusal(capsys, "--data", "faces.zip")

    header = {"descr": "<f8", "fortran_order": False, "shape": (10**15, 8)}
    with open("huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    assert "huge.npy is not readable; want" in refusal(capsys, "--data", "huge.npy")
    with zipfile.ZipFile("huge.npz", "w") as archive:
        archive.write("huge.npy", "x.npy")
    assert "huge.npz does not fit in memory: Unable" in refusal(capsys, "--data", "huge.npz")


def test_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).random((9, 4))
    np.savez("column.npz", x=x, y=np.arange(9)[:, None])
    labels = data.load("column.npz").labels
    assert labels is not None
    assert labels.tolist() == list(range(9))
    np.savez("objects.npz", x=x, y=np.array([{}] * 9, dtype=object))
    message = refusal(capsys, "--data", "objects.npz")
    assert "objects.npz, array 'y' is not readable; want" in message
    assert "without Python objects" in message


def test_channels_are_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colour images are the same data whether channels are first or last."""
    images = np.random.default_rng(0).integers(256, size=(20, 6, 5, 3), dtype=np.uint8)
    np.save("last.npy", images)
    np.save("first.npy", np.moveaxis(images, 3, 1))
    last, first = data.load("last.npy"), data.load("first.npy")
    assert last.x.shape == (20, 3, 6, 5)
    assert last.fingerprint() == first.fingerprint()
    counts = data.load("last.npy", counts=True)
    assert counts.x.shape == (20, 3, 6, 5)
    for name in ("last", "first"):
        options = ("--data", f"{name}.npy", "--sigma", "channel", "--epochs", 1, "--out", name)
        assert train(*options) == 0
        state = checkpoint.load(folder / name / "checkpoint.pt")
        assert state["model"]["likelihood.logvar"].shape == (3, 1, 1)
    assert final_state("last")["model"] == final_state("first")["model"]
    np.save("either.npy", images[:, :3])
    assert "want channels that can be told from height" in refusal(capsys, "--data", "either.npy")


def test_channels_of_grey_images_and_vectors() -> None:
    x = torch.rand(20, 6, 5)
    trainer = Trainer(Settings(sigma="channel", hidden=8), x, torch.device("cpu"))
    assert trainer.model.likelihood.logvar.shape == (1, 1)
    trainer = Trainer(Settings(sigma="channel", hidden=8), x.flatten(1), torch.device("cpu"))
    assert trainer.model.likelihood.logvar.shape == (30,)


def test_digits_and_a_folder_of_that_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "digits").mkdir()
    assert "argument --data: is 'digits', the bundled data, but there is a ./digits too" in refusal(
        capsys, "--data", "digits"
    )
    assert "digits holds no images" in refusal(capsys, "--data", "./digits")
    assert train("--epochs", 1) == 0


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
        (
            ("--resume", "--sweep-beta", 1),
            "argument --resume: no sweep of beta in runs; want --out",
        ),
        (("--resume",), "argument --resume: no run in runs; want --out"),
        (("--bins", 1), "argument --bins: is '1'; want a whole number of at least 2"),
        (("--sigma", "1e300"), "argument --sigma: is '1e300'; want a number above 0, or learned"),
        (("--min-sigma", "1e300"), "argument --min-sigma: is '1e300'; want a number above 0, from"),
        (("--lr", "1e39"), "argument --lr: is '1e39'; want a number above 0, from 1e-30 to 1e30"),
        (("--beta", "1e300"), "argument --beta: is '1e300'; want a number of at least 0 and up to"),
        (("--threads", 99999999999), "argument --threads: is '99999999999'; want a whole number"),
        (("--threads", 20000), "argument --threads: is '20000'; want a whole number above 0 and"),
        (("--batch-size", 10**20), "argument --batch-size: is '100000000000000000000'; want"),
        (("--data", ""), "argument --data: is ''; want a name"),
        (("--out", ""), "argument --out: is ''; want a name"),
        (("--sweep-beta", 1, "1.0"), "argument --sweep-beta: has 1.0 twice; want each value once"),
        (
            ("--likelihood", "laplace", "--sweep-sigma", 0.3, "optimal"),
            "sigma is optimal, likelihood laplace; want a number or one of learned",
        ),
        (
            ("--prior", "vamp", "--components", 1619),
            "components is 1619, with 1618 training examples; want at most as many",
        ),
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
    assert "argument --data: digits has shape and checksum [1797, 8, 8]" in resumed(
        "--data", "digits"
    )
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
