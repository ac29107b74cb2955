"""`python -m fastvae train` on folders of images: what is read, and as what."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_command import refusal, train

from fastvae.training import checkpoint, data, images

pytestmark = pytest.mark.usefixtures("folder", "no_pictures")

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000


def load(*pictures: Image.Image, suffix: str = "png", counts: bool = False, **options: object):
    """What two or more images are as data; without their dimension, if all are one."""
    Path("images").mkdir()
    for i, image in enumerate(pictures if len(pictures) > 1 else pictures * 2):
        image.save(f"images/{i}.{suffix}", **options)
    return data.load("images", counts=counts).x


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(suffix: str) -> None:
    x = load(Image.fromarray(RAMP), suffix=suffix)
    torch.testing.assert_close(x[0], torch.from_numpy(RAMP / np.float32(65535)))
    assert len(x.unique()) == 64


def test_floats_are_taken_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.linspace(-3, 5, 20, dtype=np.float32).reshape(4, 5)
    x = load(Image.fromarray(values), suffix="tif")
    assert torch.equal(x[0], torch.from_numpy(values))
    Image.new("L", (5, 4)).save("images/2.tif")
    message = refusal(capsys, "--data", "images")
    assert "2.tif has shape [4, 5], 0.tif has [4, 5] of floats; want" in message


def test_one_bit() -> None:
    assert torch.equal(load(Image.fromarray(np.eye(8, dtype=bool)))[0], torch.eye(8))


def test_counts_are_grey_values() -> None:
    assert load(Image.new("L", (5, 4), 7), counts=True).unique().tolist() == [7]


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (255, 0, 0, 0), [1, 1, 1]),  # a red that nobody sees
        ("RGBA", (255, 0, 51, 255), [1, 0, 0.2]),
        ("RGBA", (255, 0, 0, 51), [1, 0.8, 0.8]),
        ("LA", (0, 0), [1]),
        ("LA", (51, 255), [0.2]),
    ],
)
def test_what_is_transparent_is_white(mode: str, colour: tuple[int, ...], seen: list) -> None:
    x = load(Image.new(mode, (5, 4), colour))
    assert x.shape == ((2, 3, 4, 5) if len(seen) == 3 else (2, 4, 5))
    torch.testing.assert_close(x[0, ..., 0, 0].flatten(), torch.tensor(seen).float())


def test_palettes() -> None:
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 255, 51, 0])
    torch.testing.assert_close(load(image)[0, :, 0, 0], torch.tensor([1, 0.2, 0]))


def test_photographs_are_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("L", (8, 4))
    image.putpixel((0, 0), 255)
    x = load(image, suffix="png", exif=exif)
    assert x.shape == (2, 8, 4)
    assert x[0, 0, 3] == 1


@pytest.mark.parametrize(
    ("mode", "suffix", "said"),
    [("I", "tif", "it has Pillow's mode I, of unknown range"), ("LAB", "tif", "mode LAB")],
)
def test_unknown_ranges_are_refused(
    mode: str, suffix: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images").mkdir()
    Image.new(mode, (5, 4)).save(f"images/a.{suffix}")
    assert said in refusal(capsys, "--data", "images")


def test_bad_images_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = folder / "images"
    pictures.mkdir()
    assert "images holds no images; want files .png" in refusal(capsys, "--data", "images")
    for size in (4, 5):
        Image.new("L", (size, 4)).save(pictures / f"{size}.png")
    assert "has shape [4, 5], 4.png has [4, 4]" in refusal(capsys, "--data", "images")

    noise = np.random.default_rng(0).integers(256, size=(50, 50), dtype=np.uint8)
    for i in range(5):
        Image.fromarray(noise).save(pictures / f"{i}.png")
    (pictures / "5.png").unlink()
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:900])
    assert "images/3.png cannot be read: image file is trunc" in refusal(capsys, "--data", "images")
    (pictures / "3.png").write_text("text")
    assert "images/3.png cannot be read: cannot identify" in refusal(capsys, "--data", "images")
    Image.new("1", (20_000, 20_000)).save(pictures / "3.png")
    assert "images/3.png cannot be read: Image size" in refusal(capsys, "--data", "images")
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    frames[0].save(pictures / "3.tif", save_all=True, append_images=frames[1:])
    (pictures / "3.png").unlink()
    assert "3.tif cannot be read: it has 2 frames; want" in refusal(capsys, "--data", "images")


# ---- What is not data ----------------------------------------------------------------------------


def save_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        pixels = rng.integers(256, size=(6, 5), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")


def test_a_run_inside_of_its_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(folder / "images")
    monkeypatch.chdir(folder / "images")
    assert train("--data", ".", "--epochs", 1) == 0
    assert Path("runs/images/figure.png").is_file()
    assert train("--data", ".", "--sweep-beta", 1, "--epochs", 1) == 0
    assert Path("runs/images-sweep-beta/sweep.png").is_file()
    assert len(data.load(".").x) == 12
    assert train("--data", ".", "--resume", "--epochs", 2, "--out", "runs/images") == 0
    assert train("--data", ".", "--epochs", 1, "--out", ".") == 0
    assert len(data.load(".").x) == 12


def test_the_folder_above(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(folder / "images" / "a")
    (folder / "images" / "here").mkdir()
    monkeypatch.chdir(folder / "images" / "here")
    assert train("--data", "..", "--epochs", 1) == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]
    assert Path("runs/images/checkpoint.pt").is_file()


def test_hidden_copies_are_left_out(folder: Path) -> None:
    save_images(folder / "images")
    save_images(folder / "images" / ".ipynb_checkpoints")
    (folder / "images" / "._00.png").write_text("of macOS")
    loaded = data.load("images")
    assert loaded.x.shape == (12, 6, 5)
    assert loaded.labels is None


def test_workers_read_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(folder / "images")
    alone = data.load("images")
    read, together = images._read, threading.Barrier(3)

    def waiting(*arguments: object) -> object:
        together.wait(timeout=30)
        return read(*arguments)

    monkeypatch.setattr(images, "_read", waiting)
    assert torch.equal(data.load("images", workers=3).x, alone.x)
    assert train("--data", "images", "--workers", 3, "--epochs", 1) == 0


def test_after_an_error_no_more_images_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(folder / "images")
    (folder / "images" / "01.png").write_text("text")
    read, count = images._read, []

    def slow(*arguments: object) -> object:
        count.append(1)
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(images, "_read", slow)
    with pytest.raises(ValueError, match=r"01.png cannot be read"):
        data.load("images", workers=2)
    assert len(count) < 12


def test_a_figure_of_the_users_is_data(folder: Path) -> None:
    save_images(folder / "images")
    (folder / "images" / "00.png").rename(folder / "images" / "figure.png")
    assert len(data.load("images").x) == 12


def test_names_of_runs(folder: Path) -> None:
    for name in ("imgs.v1", "imgs.v2"):
        save_images(folder / name)
        assert train("--data", name, "--epochs", 1) == 0
        state = checkpoint.load(folder / "runs" / name / "checkpoint.pt")
        assert state["settings"]["data"] == str(folder / name)
