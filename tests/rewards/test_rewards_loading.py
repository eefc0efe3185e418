"""Missing and damaged reward models: every error says what to do, and none needs a network."""

import socket
from pathlib import Path

import huggingface_hub.constants
import pytest

from am_diffusers.rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, RewardOptions
from reward_models import (
    save_aesthetic,
    save_clip_score,
    save_hpsv2,
    save_image_reward,
    save_pickscore,
)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """A Git LFS pointer in place of the weights is the usual damage."""
    for reward, save, file in (
        (PickScore, save_pickscore, "model.safetensors"),
        (CLIPScore, save_clip_score, "model.safetensors"),
        (HPSv2, save_hpsv2, "open_clip_model.safetensors"),
        (ImageReward, save_image_reward, "model.safetensors"),
        (Aesthetic, save_aesthetic, "aesthetic_head.safetensors"),
    ):
        folder = tmp_path / reward.name
        save(folder)
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=r"damaged.*hf download"):
            reward.from_pretrained(folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE as if set at start, and any attempt to connect an error of its own."""

    def refuse(*_: object) -> None:
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "path", ["yuvalkirstain/PickScore_v1", "no/such/folder", "nowhere", "/no/such/folder"]
)
def test_missing_pickscore_names_the_download(path: str) -> None:
    with pytest.raises(ValueError, match="hf download yuvalkirstain/PickScore_v1"):
        PickScore.from_pretrained(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "path", ["xswu/HPSv2/HPS_v2.1_compressed.pt", "xswu/HPSv2", "../x/y", "/no/such/file.pt"]
)
def test_missing_hpsv2_names_the_download(path: str) -> None:
    with pytest.raises(ValueError, match=r"hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        HPSv2.from_pretrained(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["openai/clip-vit-large-patch14", "no/such/folder", "/no/such/folder"])
def test_missing_clip_score_names_the_download(path: str) -> None:
    with pytest.raises(ValueError, match=r"CLIPScore's .*hf download openai/clip-vit-large-patch14"):
        CLIPScore.from_pretrained(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", [ImageReward.released, "THUDM/ImageReward", "/no/such/ImageReward.pt"])
def test_missing_image_reward_names_the_download(tmp_path: Path, path: str) -> None:
    save_image_reward(tmp_path)
    with pytest.raises(ValueError, match=r"hf download THUDM/ImageReward ImageReward.pt"):
        ImageReward.from_pretrained(path, vocabulary=tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"hf download google-bert/bert-base-uncased vocab.txt"):
        ImageReward.from_pretrained(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", [Aesthetic.released, "/no/such/head.pth"])
def test_missing_aesthetic_names_the_download(path: str) -> None:
    with pytest.raises(ValueError, match=r"hf download birder-project/aesthetic-predictor"):
        Aesthetic.from_pretrained(path)


@pytest.mark.usefixtures("offline")
def test_clip_score_takes_no_processor_from_elsewhere(tmp_path: Path) -> None:
    save_clip_score(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"CLIPScore's tokenizer.*hf download openai/clip-vit-large-patch14"):
        CLIPScore.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no sha256"):
        CLIPScore.from_pretrained(tmp_path, sha256="00")


@pytest.mark.usefixtures("offline")
def test_missing_parts_are_named(tmp_path: Path) -> None:
    save_pickscore(tmp_path / "pick")
    (tmp_path / "pick" / "model.safetensors").rename(tmp_path / "pick.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors not found"):
        PickScore.from_pretrained(tmp_path / "pick")
    (tmp_path / "pick" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore.from_pretrained(tmp_path / "pick")
    save_hpsv2(tmp_path / "hps")
    (tmp_path / "hps" / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"open_clip_config.json not found"):
        HPSv2.from_pretrained(tmp_path / "hps")


@pytest.mark.parametrize(("option", "value"), [("mode", "exact"), ("batch_size", 0)])
def test_bad_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"expected.*{option}"):
        RewardOptions(**{option: value})  # pyright: ignore[reportArgumentType]
