"""Small random reward models of the real classes, in the folder layouts their loaders read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

CAPTIONS = (
    "a red apple on a blue background",
    "a small green frog, 3d style",
    "the yellow moon above the grey sea",
    "an orange fox in white snow",
)
SIZE = 32
CONTEXT = 16
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# Names in ImageReward.pt by ours, in the order in which they are replaced.
THEIRS = {
    "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision_model.post_layernorm": "blip.visual_encoder.norm",
    "vision_model.encoder.layers": "blip.visual_encoder.blocks",
    "layer_norm": "norm",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "text_encoder": "blip.text_encoder",
}
DROPPED = {
    "blip.vision_proj.weight": torch.zeros(4, 32),
    "blip.text_proj.bias": torch.zeros(4),
    "blip.text_encoder.embeddings.position_ids": torch.arange(20)[None],
}


def spelled_merges() -> list[tuple[str, str]]:
    """BPE merges that spell the words of `CAPTIONS` left to right, `</w>` at word ends as CLIP has it."""
    merges: dict[tuple[str, str], None] = {}
    for word in " ".join(CAPTIONS).replace(",", "").split():
        left = word[0]
        for letter in [*word[1:-1], *(word[-1] + "</w>" for _ in word[1:2])]:
            merges[left, letter] = None
            left += letter
    return list(merges)


def vocabulary(merges: list[tuple[str, str]], begin: str, end: str) -> dict[str, int]:
    """CLIP's order of tokens: bytes, bytes at word ends, merges, begin and end marks."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), begin, end]
    return {token: row for row, token in enumerate(tokens)}


def randomize(model: nn.Module, seed: int) -> None:
    """Random weights, of a size at which scores differ between pictures as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 1.5 * noise * parameter[0].numel() ** -0.5
        elif parameter.ndim == 1 and not bool((parameter == 1).all()):
            parameter.data = 0.1 * noise


def save_pickscore(folder: Path, *, size: int = SIZE, eos_token_id: int | None = None) -> CLIPModel:
    """Write a small PickScore folder; `eos_token_id=2` writes the old mistake of released configs."""
    return save_clip(folder, size, eos_token_id, "gelu", seed=0)


def save_clip_score(folder: Path) -> CLIPModel:
    """Write a small CLIPScore folder with the activation and the old mistake of OpenAI's config."""
    return save_clip(folder, SIZE, 2, "quick_gelu", seed=2)


def save_clip(folder: Path, size: int, eos_token_id: int | None, hidden_act: str, seed: int) -> CLIPModel:
    """Write a small CLIP model with tokenizer and preprocessing."""
    merges = spelled_merges()
    vocab = vocabulary(merges, "<|startoftext|>", "<|endoftext|>")
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "hidden_act": hidden_act}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": eos_token_id or len(vocab) - 1}
    text = tower | {"vocab_size": len(vocab), "max_position_embeddings": CONTEXT} | ids
    vision = tower | {"image_size": size, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    randomize(model, seed)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)
    crop = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)
    return model.eval()


def open_clip_config(vocab_size: int, size: int = SIZE) -> dict[str, object]:
    """An open_clip model config with small towers."""
    vision = {"image_size": size, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}


def save_hpsv2(folder: Path) -> CLIP:
    """Write a small HPSv2 folder in open_clip's hub layout, with a vocabulary of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = spelled_merges()
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])
    (folder / "bpe_simple_vocab.txt.gz").write_bytes(gzip.compress(text.encode()))
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "bpe_simple_vocab.txt.gz"))
    config = open_clip_config(tokenizer.vocab_size)
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "longest"}
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    model = CLIP(**config)
    randomize(model, 1)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval()


class PublishedHead(nn.Module):
    """The five layers as published, dropouts included, which do nothing in evaluation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = [nn.Linear(*size) for size in zip((width, 12, 10, 8, 6), (12, 10, 8, 6, 1), strict=True)]
        dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        layers = [layer for pair in zip(linear, dropouts, strict=False) for layer in pair]
        self.layers = nn.Sequential(*layers, *linear[3:])

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def save_aesthetic(folder: Path) -> tuple[CLIPModel, PublishedHead]:
    """Write a small CLIP model and a head on its image features."""
    clip = save_clip(folder, SIZE, None, "quick_gelu", seed=3)
    head = PublishedHead(16)
    randomize(head, 4)
    save_file(head.state_dict(), folder / "aesthetic_head.safetensors")
    return clip, head.eval()


class PublishedImageReward(nn.Module):
    """Towers and head of ImageReward, small."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = PublishedHead(text.hidden_size)


def bert_vocabulary() -> list[str]:
    """Marks, letters, and the words of `CAPTIONS`; long ones consist of several pieces."""
    marks = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({letter for letter in "".join(CAPTIONS) if letter.strip()})
    words = " ".join(CAPTIONS).replace(",", "").split()
    pieces = sorted({word if len(word) < 6 else word[:3] for word in words if len(word) > 1})
    return [*marks, *letters, *(f"##{letter}" for letter in letters if letter.isalnum()), *pieces]


def image_reward_config() -> dict[str, Any]:
    """The config.json of a small ImageReward."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    vision = tower | {"hidden_size": 32, "intermediate_size": 64, "image_size": SIZE, "patch_size": 8}
    text = tower | {"hidden_size": 24, "intermediate_size": 48, "max_position_embeddings": CONTEXT + 4}
    return {
        "vision_config": vision | {"layer_norm_eps": 1e-6},
        "text_config": text | {"layer_norm_eps": 1e-12, "vocab_size": len(bert_vocabulary()) + 2},
        "mlp_widths": [12, 10, 8, 6],
        "context_length": CONTEXT,
        "mean": 0.2,
        "std": 1.5,
    }


def save_image_reward(folder: Path) -> PublishedImageReward:
    """Write a small ImageReward folder with a vocabulary of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = image_reward_config()
    text = BlipTextConfig(**config["text_config"], encoder_hidden_size=32)
    model = PublishedImageReward(BlipVisionConfig(**config["vision_config"]), text)
    randomize(model, 5)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


def released_image_reward(folder: Path) -> dict[str, Tensor]:
    """The weights of a small folder under their released names, with what the released file has besides."""
    weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        for ours, theirs in THEIRS.items():
            key = key.replace(ours, theirs)
        weights[key] = value
    return weights | DROPPED


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
    """Change values of a JSON file; `a__b` is key b of the object a."""
    document = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[key] = value
    file.write_text(json.dumps(document))


SAVE: dict[str, Callable[[Path], object]] = {
    "pickscore": save_pickscore,
    "clip_score": save_clip_score,
    "hpsv2": save_hpsv2,
    "aesthetic": save_aesthetic,
    "image_reward": save_image_reward,
}
