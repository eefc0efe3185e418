"""Stage `text`: the pipeline's two CLIP text towers, contrastively, against one shared picture tower."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .contrastive import contrastive_loss, draw_captions, hard_batch, matches
from .data import TEMPLATES, PictureSet
from .loop import train
from .tokens import CONTEXT_LENGTH, clip_tokenizer, learn_merges

WIDTH = 128


def all_captions(data: PictureSet) -> list[str]:
    """The captions of all combinations, in every template but the empty one."""
    labels = data.labels(torch.arange(math.prod(data.shape)))
    return [caption for i in range(len(TEMPLATES) - 1) for caption in data.captions(labels, i)]


def caption_vocabulary(data: PictureSet, folder: Path) -> list[tuple[str, str]]:
    """Merges learned from the captions of all combinations, kept in `folder` for every later stage.

    The learner breaks ties at random, so learning twice would number the tokens differently.
    """
    file = folder / "merges.json"
    if not file.exists():
        file.write_text(json.dumps(learn_merges(all_captions(data))))
    return [tuple(pair) for pair in json.loads(file.read_text())]


def text_config(vocab_size: int, width: int = WIDTH, layers: int = 3) -> CLIPTextConfig:
    """Configuration of a small CLIP text tower over our vocabulary."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        attn_implementation="eager",
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def vision_config(width: int = 192, layers: int = 4, patch: int = 16) -> CLIPVisionConfig:
    """Configuration of a small CLIP picture tower for 64 x 64 pixels."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attn_implementation="eager",  # twice as fast as the fused kernel in bfloat16 on the CPU
        image_size=64,
        patch_size=patch,
    )


class Towers(nn.Module):
    """One picture tower, two text towers and the scale of their cosines."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vision = CLIPVisionModelWithProjection(vision_config())
        self.texts = nn.ModuleList(CLIPTextModelWithProjection(text_config(vocab_size)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(2.66))


def train_text(data: PictureSet, folder: Path, steps: int, batch: int = 128) -> None:
    """Train and save `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2` below `folder`."""
    torch.manual_seed(0)
    merges = caption_vocabulary(data, folder)
    tokenizer = clip_tokenizer(merges)
    towers = Towers(len(tokenizer))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        labels = hard_batch(data, batch, generator)
        captions, templates = draw_captions(data, labels, generator)
        pictures = 2 * data.pictures(labels, generator) - 1
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        true = matches(labels, templates)
        with torch.autocast("cpu", torch.bfloat16):
            images = towers.vision(pictures).image_embeds
            texts = [text(tokens).text_embeds for text in towers.texts]
        scale = towers.log_scale.exp().clamp(max=50)
        losses = [contrastive_loss(images, features, scale, true) for features in texts]
        return torch.stack(losses).sum(), {"scale": scale.item()}

    ema = train(towers, loss_of_step, steps=steps, peak_rate=1e-3, state_file=folder / "text.pt")
    towers.load_state_dict(ema.values)
    for tower, suffix in zip(towers.texts, ("", "_2"), strict=True):
        tower.save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
