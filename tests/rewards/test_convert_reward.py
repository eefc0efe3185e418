"""scripts/convert_reward.py: the folder scores as the pickle does, and other files are refused."""

import hashlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from am_diffusers.rewards import REWARDS, image_reward
from am_diffusers.rewards.parts.blip import ScorerConfig
from reward_models import (
    CAPTIONS,
    image_reward_config,
    open_clip_config,
    released_image_reward,
    save_aesthetic,
    save_image_reward,
)

SCRIPT = Path(__file__).parents[2] / "scripts/convert_reward.py"
IMAGES = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def hpsv2_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    config = open_clip_config(49408)
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-H-14": config}.get)
    torch.manual_seed(0)
    weights = {key: value.half() for key, value in open_clip.model.CLIP(**config).state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, folder / "published.pt")
    return {}


def image_reward_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    save_image_reward(folder / "small")
    monkeypatch.setattr(image_reward, "RELEASED", ScorerConfig(**image_reward_config()))
    torch.save(released_image_reward(folder / "small"), folder / "published.pt")
    return {"vocabulary": folder / "small/vocab.txt"}


def aesthetic_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    save_aesthetic(folder / "small")
    torch.save(load_file(folder / "small/aesthetic_head.safetensors"), folder / "published.pt")
    return {"vision": folder / "small"}


PICKLES: dict[str, Callable] = {
    "hpsv2": hpsv2_pickle,
    "image_reward": image_reward_pickle,
    "aesthetic": aesthetic_pickle,
}


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("name", PICKLES)
def test_the_folder_scores_as_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    beside, file = PICKLES[name](tmp_path, monkeypatch), tmp_path / "published.pt"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    convert(monkeypatch, name, file, tmp_path / "out", "--sha256", sha256)
    load = REWARDS[name].from_pretrained
    assert not list((tmp_path / "out").glob("*.pt"))
    scores = load(tmp_path / "out", **beside)(IMAGES, CAPTIONS[:2])
    assert torch.equal(scores, load(file, sha256=sha256, **beside)(IMAGES, CAPTIONS[:2]))


@pytest.mark.parametrize("name", PICKLES)
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    PICKLES[name](tmp_path, monkeypatch)
    file = tmp_path / "published.pt"
    with pytest.raises(SystemExit, match="sha256"):
        convert(monkeypatch, name, file, tmp_path / "out", "--sha256", "0" * 64)
    torch.save({"state_dict": {"a": torch.ones(1)}}, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(SystemExit, match=r"keys|expected tensors by name"):
        convert(monkeypatch, name, file, tmp_path / "out", "--sha256", sha256)
    assert not (tmp_path / "out").exists()
