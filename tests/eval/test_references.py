"""Reference images as they are seen: upright, on white, in the range of their mode."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluating.image_files import read_image
from evaluating.measuring.references import find_references
from evaluating.measuring.weights import fingerprint

RED = (255, 0, 0)
FEATURES = ("clip",)


def save(image, file, **more):
    image.save(file, format="TIFF" if image.mode in ("I", "F", "LAB") else None, **more)
    return file


def check(file, expected):
    """Compare the pixels (3, H, W) with rows of RGB values in [0, 1]."""
    torch.testing.assert_close(
        read_image(file).permute(1, 2, 0), torch.tensor(expected).float(), atol=2e-3, rtol=0
    )


def test_transparency_is_seen_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 51))
    image.putpixel((2, 0), (0, 0, 255, 255))
    seen = [[[1, 1, 1], [1, 0.8, 0.8], [0, 0, 1]]]
    check(save(image, tmp_path / "rgba.png"), seen)
    check(save(image, tmp_path / "rgba.webp", lossless=True, exact=True), seen)
    check(save(Image.new("LA", (1, 1), (0, 51)), tmp_path / "la.png"), [[[0.8, 0.8, 0.8]]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    check(save(palette, tmp_path / "p.png", transparency=0), [[[1, 1, 1], [1, 0, 0]]])
    check(save(palette, tmp_path / "opaque.png"), [[[0, 0, 0], [1, 0, 0]]])
    check(save(Image.new("RGB", (1, 1), RED), tmp_path / "rgb.png", transparency=RED), [[[1, 1, 1]]])
    check(save(Image.new("L", (1, 1), 7), tmp_path / "l.png", transparency=7), [[[1, 1, 1]]])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_upright(tmp_path, suffix, turn):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    # How a camera that is held so stores them.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / f"p.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif, quality=95)
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 255
    found = read_image(file)
    assert found.shape == (3, 16, 32)
    assert (found - expected).abs().max() < 0.1


def test_values_are_scaled_by_the_range_of_the_mode(tmp_path):
    def levels(*values):
        return [[[value] * 3 for value in values]]

    sixteen = Image.fromarray(np.array([[0, 6554, 65535]], np.uint16))
    assert sixteen.mode == "I;16"
    check(save(sixteen, tmp_path / "16.png"), levels(0, 0.1, 1))
    whole = Image.fromarray(np.array([[0, 6554, 65535]], np.int32))
    assert whole.mode == "I"
    check(save(whole, tmp_path / "i.png"), levels(0, 0.1, 1))
    check(save(Image.fromarray(np.array([[0, 0.1, 1]], np.float32)), tmp_path / "f.png"), levels(0, 0.1, 1))
    check(save(Image.fromarray(np.array([[0, 51, 255]], np.uint8)), tmp_path / "l.png"), levels(0, 0.2, 1))
    check(save(Image.new("1", (1, 1), 1), tmp_path / "1.png"), levels(1))
    check(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "k.jpg"), 8 * [8 * [[1, 0, 0]]])


def broken(tmp_path):
    """Files that aren't read, by what is wrong with them."""
    lab = Image.new("LAB", (2, 2), (128, 0, 0))
    save(lab, tmp_path / "no RGB.png")
    save(Image.fromarray(np.array([[-1, 70000]], np.int32)), tmp_path / "beyond 16 bits.png")
    save(Image.fromarray(np.array([[0.5, 255.0]], np.float32)), tmp_path / "beyond 1.png")
    save(Image.fromarray(np.array([[0.5, np.nan]], np.float32)), tmp_path / "not finite.png")
    grey = Image.fromarray(np.full((1, 1), 5, np.uint16))
    grey.save(tmp_path / "16 bits and clear.png", transparency=5)
    (tmp_path / "text.png").write_text("<html>")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "whole.png").unlink()
    return sorted(tmp_path.iterdir())


def test_what_is_left_is_refused_by_name(tmp_path):
    files = broken(tmp_path)
    assert len(files) == 7
    for file in files:
        with pytest.raises(ValueError, match="no image that can be read") as caught:
            read_image(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["no RGB.png", "16 bits and clear.png", "text.png"])
def test_modes_are_checked_before_weights_are_read(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(folder / place)
    broken(tmp_path)
    (tmp_path / name).rename(folder / name)
    with pytest.raises(ValueError, match=f"{name} is no image that can be read"):
        find_references(folder, FEATURES)


def test_what_systems_leave_in_folders_is_no_picture(tmp_path):
    folder = tmp_path / ".cache/photos"
    (folder / ".thumbnails").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    (folder / "folder.png").mkdir()
    for name in ("b.JPG", "a.png", ".thumbnails/a.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    for name in ("._a.png", ".DS_Store", ".nfs000001.png", "__MACOSX/._a.png", "Thumbs.db"):
        (folder / name).write_bytes(b"\0\x05\x16\x07")
    assert [file.name for file in find_references(folder, FEATURES)] == ["a.png", "b.JPG"]


def test_what_systems_leave_beside_weights_makes_them_no_others(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(str(tmp_path))
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/model.safetensors.metadata").write_text("today")
    (tmp_path / ".DS_Store").write_bytes(b"left")
    assert fingerprint(str(tmp_path)) == before
