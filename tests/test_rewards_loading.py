"""What the loaders of PickScore and HPSv2 accept, and how they refuse the rest."""

import json
import pickle
import socket
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from reward_models import CAPTIONS, CLIP_MEAN, CLIP_STD, open_clip_config, save_hpsv2, save_pickscore
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from am_diffusers.rewards import HPSv2, PickScore

IMAGES = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def edit_weights(file: Path, *, drop: str = "", add: str = "", resize: str = "") -> None:
    """Rewrite a safetensors file with one key missing, one too many, or one of another shape."""
    weights = load_file(file)
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.arange(4)
    if resize:
        weights[resize] = weights[resize][..., :-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    document = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[key] = value
    file.write_text(json.dumps(document))


PICK_EDITS = {"drop": "text_projection.weight", "add": "visual.proj", "resize": "visual_projection.weight"}
HPS_EDITS = {"drop": "visual.proj", "add": "text_projection.weight", "resize": "text_projection"}


@pytest.mark.parametrize("edit", PICK_EDITS)
def test_pickscore_refuses_other_weights(tmp_path: Path, edit: str) -> None:
    save_pickscore(tmp_path)
    edit_weights(tmp_path / "model.safetensors", **{edit: PICK_EDITS[edit]})
    message = {
        "drop": "1 missing, e.g. text_proj",
        "add": "1 unexpected, e.g. visual.proj",
        "resize": "fit its",
    }
    with pytest.raises(ValueError, match=message[edit]):
        PickScore.from_pretrained(tmp_path)


@pytest.mark.parametrize("edit", HPS_EDITS)
def test_hpsv2_refuses_other_weights(tmp_path: Path, edit: str) -> None:
    save_hpsv2(tmp_path)
    edit_weights(tmp_path / "open_clip_model.safetensors", **{edit: HPS_EDITS[edit]})
    message = {"drop": "1 missing, e.g. visual.proj", "add": "1 unexpected, e.g. text_projection.weight"}
    with pytest.raises(ValueError, match=message.get(edit, r"shapes: text_projection \(32, 15\)")):
        HPSv2.from_pretrained(tmp_path)


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
    with pytest.raises(ValueError, match="isn't a released HPSv2 checkpoint"):
        HPSv2.from_pretrained(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", pickle.dumps([1], protocol=2), b"\x80\x02}."])
def test_hpsv2_refuses_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="isn't a released HPSv2 checkpoint"):
        HPSv2.from_pretrained(file)


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
def test_bad_options_are_refused_before_loading(option: str, value: object) -> None:
    for reward in (PickScore, HPSv2):
        with pytest.raises(ValueError, match=f"expected.*{option}"):
            reward.from_pretrained("nowhere", **{option: value})
