"""Which folders PickScore and CLIPScore read, and how they refuse the rest."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from am_diffusers.rewards import OFFICIAL, CLIPScore, PickScore
from reward_models import (
    CAPTIONS,
    CLIP_MEAN,
    CLIP_STD,
    edit_json,
    edit_weights,
    save_clip_score,
    save_pickscore,
)

IMAGES = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_pickscore_accepts_the_buffers_of_old_checkpoints(tmp_path: Path) -> None:
    model = save_pickscore(tmp_path)
    edit_weights(tmp_path / "model.safetensors", add="text_model.embeddings.position_ids")
    reward = PickScore.from_pretrained(tmp_path)
    assert isinstance(reward._clip, CLIPModel)
    assert torch.equal(reward._clip.text_projection.weight, model.text_projection.weight)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "expected a CLIP model.*siglip"),
        ("preprocessor_config.json", {"resample": 2}, "CLIP's preprocessing"),
        ("preprocessor_config.json", {"do_center_crop": False}, "CLIP's preprocessing"),
        ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 32}}, "CLIP's preprocessing"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "CLIP's preprocessing"),
        ("config.json", {"text_config__eos_token_id": 7}, "end mark 7"),
        ("config.json", {"text_config__vocab_size": 90}, "at most 90 tokens"),
    ],
)
def test_pickscore_refuses_other_configs(tmp_path: Path, file: str, changes: dict, message: str) -> None:
    save_pickscore(tmp_path)
    if "vocab_size" in str(changes):
        edit_embedding(tmp_path, 90)
    edit_json(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=message):
        PickScore.from_pretrained(tmp_path)


def edit_embedding(folder: Path, rows: int) -> None:
    key, file = "text_model.embeddings.token_embedding.weight", folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {key: weights[key][:rows].contiguous()}, file, metadata={"format": "pt"})


def test_pickscore_reads_released_configs_that_give_the_end_mark_as_two(tmp_path: Path) -> None:
    """PickScore_v1's config.json says eos_token_id 2; transformers then pools at the highest id."""
    save_pickscore(tmp_path / "right")
    save_pickscore(tmp_path / "old", eos_token_id=2)
    right, old = (PickScore.from_pretrained(tmp_path / name) for name in ("right", "old"))
    assert torch.equal(right(IMAGES, CAPTIONS[:2]), old(IMAGES, CAPTIONS[:2]))


def test_pickscore_takes_the_processor_from_another_folder(tmp_path: Path) -> None:
    save_pickscore(tmp_path / "whole")
    model = CLIPModel.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "weights")
    expected = PickScore.from_pretrained(tmp_path / "whole")(IMAGES, CAPTIONS[:2])
    reward = PickScore.from_pretrained(tmp_path / "weights", processor=tmp_path / "whole")
    assert torch.equal(reward(IMAGES, CAPTIONS[:2]), expected)


def test_pickscore_reads_old_preprocessor_configs(tmp_path: Path) -> None:
    """As in laion's repository: plain numbers for sizes, no processor type, vocab.json and merges.txt."""
    save_pickscore(tmp_path)
    expected = PickScore.from_pretrained(tmp_path, options=OFFICIAL)(IMAGES, CAPTIONS[:2])
    steps = {f"do_{step}": True for step in ("resize", "center_crop", "normalize")}
    old = {"size": 32, "crop_size": 32, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD} | steps
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer.json").unlink()
    scores = PickScore.from_pretrained(tmp_path, options=OFFICIAL)(IMAGES, CAPTIONS[:2])
    assert torch.equal(scores, expected)


@pytest.mark.usefixtures("offline")
def test_missing_parts_are_named(tmp_path: Path) -> None:
    save_pickscore(tmp_path / "pick")
    (tmp_path / "pick" / "model.safetensors").rename(tmp_path / "pick.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors not found"):
        PickScore.from_pretrained(tmp_path / "pick")
    (tmp_path / "pick" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore.from_pretrained(tmp_path / "pick")


@pytest.mark.usefixtures("offline")
def test_clip_score_takes_no_processor_from_elsewhere(tmp_path: Path) -> None:
    save_clip_score(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"CLIPScore's tokenizer.*hf download openai/clip-vit-large-patch14"):
        CLIPScore.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no sha256"):
        CLIPScore.from_pretrained(tmp_path, sha256="00")
