"""Stages `pickscore_towers` and `hpsv2_towers`: the rewards' models, contrastively, before preferences."""

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD

from .contrastive import contrastive_loss, draw_captions, hard_batch, matches
from .data import PictureSet
from .loop import train
from .text import WIDTH, caption_vocabulary, text_config, vision_config
from .tokens import CONTEXT_LENGTH, clip_tokenizer, write_open_clip_vocabulary

SEEDS = {"pickscore": 1, "hpsv2": 2, "image_reward": 3}


class RewardTowers(nn.Module):
    """A CLIP model of either library behind one face: images in [0, 1] and token numbers to features."""

    def __init__(self, model: CLIPModel | CLIP) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def images(self, pictures: Tensor) -> Tensor:
        """Features (B, WIDTH) of pictures (B, 3, 64, 64) in [0, 1]."""
        pixels = (pictures - self.mean) / self.std
        if isinstance(self.model, CLIP):
            return self.model.encode_image(pixels)
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def texts(self, tokens: Tensor) -> Tensor:
        """Features (B, WIDTH) of token numbers (B, CONTEXT_LENGTH)."""
        if isinstance(self.model, CLIP):
            return self.model.encode_text(tokens)
        return self.model.get_text_features(input_ids=tokens).pooler_output

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with while training, at most 50."""
        return self.model.logit_scale.exp().clamp(max=50)


def open_clip_config(vocab_size: int) -> dict:
    """`model_cfg` of the small HPSv2."""
    vision = {"image_size": 64, "layers": 4, "width": 192, "patch_size": 8, "head_width": 48}
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": vocab_size,
        "width": WIDTH,
        "heads": 4,
        "layers": 3,
    }
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}


def new_towers(name: str, vocab_size: int) -> RewardTowers:
    """Untrained towers of one of the two rewards."""
    torch.manual_seed(SEEDS[name])
    if name == "hpsv2":
        return RewardTowers(CLIP(**open_clip_config(vocab_size)))
    text, vision = text_config(vocab_size), vision_config(patch=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    return RewardTowers(CLIPModel._from_config(config, attn_implementation="eager"))


def own_part(data: PictureSet, name: str) -> PictureSet:
    """The picture set with three quarters of the training combinations, others for each reward."""
    part = PictureSet.__new__(PictureSet)
    part.__dict__.update(data.__dict__)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(SEEDS[name]))
    part.train = data.train[order[: 3 * len(order) // 4].sort()[0]]
    return part


def train_towers(data: PictureSet, folder: Path, name: str, steps: int, batch: int = 96) -> None:
    """Train the towers of reward `name`; the state stays in `folder` for the preference stage."""
    data = own_part(data, name)
    tokenizer = clip_tokenizer(caption_vocabulary(data, folder))
    towers = new_towers(name, len(tokenizer))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(1_000_000 * SEEDS[name] + step)
        labels = hard_batch(data, batch, generator)
        captions, templates = draw_captions(data, labels, generator)
        pictures = data.pictures(labels, generator)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            images, texts = towers.images(pictures), towers.texts(tokens)
        loss = contrastive_loss(images, texts, towers.scale, matches(labels, templates))
        return loss, {"scale": towers.scale.item()}

    with sdpa_kernel(SDPBackend.MATH):
        ema = train(
            towers, loss_of_step, steps=steps, peak_rate=1e-3, state_file=folder / f"{name}_towers.pt"
        )
    torch.save(ema.values, folder / f"{name}_towers_ema.pt")


def save_pickscore(towers: RewardTowers, merges: list[tuple[str, str]], folder: Path) -> None:
    """The folder layout that PickScore.from_pretrained reads."""
    assert isinstance(towers.model, CLIPModel)
    towers.model.half().save_pretrained(folder)
    clip_tokenizer(merges).save_pretrained(folder)
    size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    CLIPImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder)


def save_hpsv2(towers: RewardTowers, merges: list[tuple[str, str]], folder: Path) -> None:
    """The folder layout that HPSv2.from_pretrained reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_open_clip_vocabulary(merges, folder / "bpe_simple_vocab.txt.gz")
    preprocess = {"size": 64, "mode": "RGB", "mean": CLIP_MEAN, "std": CLIP_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "longest", "fill_color": 0}
    config = {"model_cfg": open_clip_config(len(clip_tokenizer(merges))), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    weights = {key: value.half().contiguous() for key, value in towers.model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
