"""Small random reward models of the real classes, in the folder layouts their loaders read."""

import gzip
import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

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
    merges = spelled_merges()
    vocab = vocabulary(merges, "<|startoftext|>", "<|endoftext|>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": eos_token_id or len(vocab) - 1}
    text = tower | {"vocab_size": len(vocab), "max_position_embeddings": CONTEXT, "hidden_act": "gelu"} | ids
    vision = tower | {"image_size": size, "patch_size": 8, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    randomize(model, 0)
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
