"""Stage `text`: the pipeline's two CLIP text towers, contrastively, against one shared image tower."""

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
from .loop import Loop, fast
from .tokens import CONTEXT_LENGTH, clip_tokenizer, learn_merges
from .world import EMPTY, World, draw_conditions

WIDTH = 128


def all_captions(world: World) -> list[str]:
    """Word the captions of all combinations, allowed or not, in every template but the empty one."""
    labels = world.labels(torch.arange(math.prod(world.shape)))
    return [caption for template in range(EMPTY) for caption in world.captions(labels, template)]


def caption_vocabulary(world: World, folder: Path) -> list[tuple[str, str]]:
    """Learn merges from all captions, once: they are kept in `folder` for every later stage.

    The learner breaks ties at random, so learning twice would number the tokens differently.
    """
    file = folder / "merges.json"
    if not file.exists():
        file.write_text(json.dumps(learn_merges(all_captions(world))))
    return [tuple(pair) for pair in json.loads(file.read_text())]


def text_config(vocab_size: int, width: int = WIDTH, layers: int = 2) -> CLIPTextConfig:
    """Configure a small CLIP text tower over our vocabulary."""
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
    """Configure a small CLIP image tower for 64 x 64 pixels."""
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
    """One image tower, two text towers and the scale of their cosines."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vision = CLIPVisionModelWithProjection(vision_config(128, 2))
        self.texts = nn.ModuleList(CLIPTextModelWithProjection(text_config(vocab_size)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(2.66))


def train_text(world: World, loop: Loop) -> None:
    """Train and save `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2` in the loop's folder."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(caption_vocabulary(world, loop.folder))
    towers = Towers(len(tokenizer)).to(loop.device)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        labels = hard_batch(world, loop.batch, generator)
        captions, templates = draw_captions(world, labels, generator)
        labels = labels.replace(condition=draw_conditions(loop.batch, generator, 0.2))
        images = (2 * world.images(labels, generator) - 1).to(loop.device)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        true = matches(labels, templates)
        with fast(loop.device):
            features = towers.vision(images).image_embeds
            texts = [text(tokens.to(loop.device)).text_embeds for text in towers.texts]
        scale = towers.log_scale.exp().clamp(max=50)
        losses = [contrastive_loss(features, of_text, scale, true) for of_text in texts]
        return torch.stack(losses).sum(), {"scale": scale.item()}

    ema = loop.train(towers, loss_of_step, peak_rate=1e-3, name="text")
    towers.load_state_dict(ema.values)
    for tower, suffix in zip(towers.texts, ("", "_2"), strict=True):
        tower.cpu().save_pretrained(loop.folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(loop.folder / f"tokenizer{suffix}")
