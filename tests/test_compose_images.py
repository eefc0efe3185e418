"""Real images of captions, as `scripts/assets/compose_images.py` writes them."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from am_diffusers.rewards import WorldClean, WorldRight
from evaluating.image_files import read_image

SCRIPT = Path(__file__).parents[1] / "scripts/assets/compose_images.py"
CAPTIONS = [
    "an apple on an orange background",
    "a pine tree on a yellow background",
    "a snowman on a purple background",
    "an umbrella on a green background",
]


def compose(
    folder: Path, captions: list[str], images: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(captions))
    flags = ["--prompts", prompts, "--output_dir", folder, "--num_images_per_prompt", images, "--seed", seed]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


def test_composed_images_are_clean_and_show_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compose(tmp_path / "real", CAPTIONS, 3, 0, monkeypatch)
    assert capsys.readouterr().out == f"12 images in {folder}\n"
    files = [folder / f"{prompt:05d}-{image:03d}.png" for prompt in range(4) for image in range(3)]
    images = torch.stack([read_image(file) for file in files])
    prompts = [caption for caption in CAPTIONS for _ in range(3)]
    for judge in (WorldClean(), WorldRight()):
        assert judge(images, prompts).tolist() == [1] * 12
    assert (images[0] - images[1]).abs().max() > 0.1  # at other places
    again = compose(tmp_path / "other", CAPTIONS, 1, 1, monkeypatch)
    assert (read_image(again / "00000-000.png") - images[0]).abs().max() > 0.1  # another seed


def test_what_cannot_be_composed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match=r"'an aple .* \(prompt 2\) is no caption .*: 'an apple on an orange"
    ):
        compose(tmp_path / "a", [CAPTIONS[1], CAPTIONS[0].replace("apple", "aple")], 1, 0, monkeypatch)
    with pytest.raises(SystemExit, match="num_images_per_prompt 0: expected at least 1"):
        compose(tmp_path / "a", CAPTIONS, 0, 0, monkeypatch)
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/00000-000.png").touch()
    with pytest.raises(SystemExit, match="full is not empty"):
        compose(tmp_path / "full", CAPTIONS, 1, 0, monkeypatch)
