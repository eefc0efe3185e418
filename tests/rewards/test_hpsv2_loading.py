"""Which folders and files HPSv2 reads, and how it refuses the rest."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from am_diffusers.rewards import HPSv2
from reward_models import (
    CAPTIONS,
    CLIP_MEAN,
    CLIP_STD,
    edit_json,
    open_clip_config,
    save_hpsv2,
)

IMAGES = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess_cfg__resize_mode": "shortest"}, "preprocess_cfg"),
        ({"preprocess_cfg__interpolation": "bilinear"}, "preprocess_cfg"),
        ({"preprocess_cfg__size": 64}, "preprocess_cfg"),
        ({"model_cfg__colour": "red"}, "model_cfg"),
        ({"model_cfg": {}}, "isn't an open_clip config"),
        ({"preprocess_cfg": {"std": CLIP_STD}}, "isn't an open_clip config.*mean"),
    ],
)
def test_hpsv2_refuses_other_configs(tmp_path: Path, changes: dict, message: str) -> None:
    save_hpsv2(tmp_path)
    edit_json(tmp_path / "open_clip_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        HPSv2.from_pretrained(tmp_path)


def test_hpsv2_refuses_another_vocabulary(tmp_path: Path) -> None:
    save_hpsv2(tmp_path)
    (tmp_path / "bpe_simple_vocab.txt.gz").unlink()  # falls back to CLIP's, which is far larger
    with pytest.raises(ValueError, match="49408"):
        HPSv2.from_pretrained(tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_missing_config_is_named(tmp_path: Path) -> None:
    save_hpsv2(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"open_clip_config.json not found"):
        HPSv2.from_pretrained(tmp_path)


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint in the form of HPS_v2.1_compressed.pt: half precision under "state_dict"."""
    config = open_clip_config(49408)
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-H-14": config}.get)
    torch.manual_seed(0)
    weights = {key: value.half() for key, value in open_clip.model.CLIP(**config).state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path / "HPS_v2.1_compressed.pt"


def test_hpsv2_reads_a_released_file(released: Path, tmp_path: Path) -> None:
    reward = HPSv2.from_pretrained(released)
    weights = torch.load(released, weights_only=True)["state_dict"]
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({key: value.float() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    document = {"model_cfg": open_clip_config(49408), "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    expected = HPSv2.from_pretrained(folder)(IMAGES, CAPTIONS[:2])
    assert torch.equal(reward(IMAGES, CAPTIONS[:2]), expected)


def test_hpsv2_never_unpickles_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": Harmful()}, file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        HPSv2.from_pretrained(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("document", [{"model": {}}, [1.0]])
def test_hpsv2_refuses_checkpoints_without_a_state_dict(tmp_path: Path, document: object) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save(document, file)
    with pytest.raises(ValueError, match="no `state_dict`"):
        HPSv2.from_pretrained(file)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", pickle.dumps([1], protocol=2), b"\x80\x02}."]
)
def test_hpsv2_refuses_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|no `state_dict`"):
        HPSv2.from_pretrained(file)
