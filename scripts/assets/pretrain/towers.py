"""Stages `pickscore` and `hpsv2`: CLIP towers, contrastively and on preferences (Bradley-Terry)."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD

from .contrastive import contrastive_loss, draw_captions, hard_batch, matches
from .loop import Loop, fast
from .preferences import SEEDS, Pairs, own_part
from .text import WIDTH, caption_vocabulary, text_config, vision_config
from .tokens import CONTEXT_LENGTH, clip_tokenizer, write_open_clip_vocabulary
from .world import World, draw_conditions


class RewardTowers(nn.Module):
    """A CLIP model of either library behind one face: images in [0, 1] and token numbers to features."""

    def __init__(self, model: CLIPModel | CLIP) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, 64, 64) in [0, 1] to unit features (B, WIDTH)."""
        pixels = (images - self.mean) / self.std
        if isinstance(self.model, CLIP):
            features = self.model.encode_image(pixels)
        else:
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features.float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Encode token numbers (B, CONTEXT_LENGTH) to unit features (B, WIDTH)."""
        if isinstance(self.model, CLIP):
            features = self.model.encode_text(tokens)
        else:
            features = self.model.get_text_features(input_ids=tokens).pooler_output
        return F.normalize(features.float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with while training, at most 50."""
        return self.model.logit_scale.exp().clamp(max=50)


def open_clip_config(vocab_size: int) -> dict:
    """Configure `model_cfg` of the small HPSv2."""
    vision = {"image_size": 64, "layers": 4, "width": 192, "patch_size": 8, "head_width": 48}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": WIDTH}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text | {"heads": 4, "layers": 3}}


def new_towers(name: str, vocab_size: int) -> RewardTowers:
    """Make untrained towers of one of the two rewards."""
    torch.manual_seed(SEEDS[name])
    if name == "hpsv2":
        return RewardTowers(CLIP(**open_clip_config(vocab_size)))
    text, vision = text_config(vocab_size), vision_config(patch=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    return RewardTowers(CLIPModel._from_config(config, attn_implementation="eager"))


def train_towers(world: World, loop: Loop, name: str) -> None:
    """Train reward `name` and save it to `tiny_{name}` in the loop's folder."""
    merges, pool = caption_vocabulary(world, loop.folder), own_part(world, name)
    tokenizer = clip_tokenizer(merges)
    towers = new_towers(name, len(tokenizer)).to(loop.device)
    pairs = Pairs(world, pool, loop.folder)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(1_000_000 * SEEDS[name] + step)
        labels = hard_batch(world, loop.batch, generator, pool)
        captions, templates = draw_captions(world, labels, generator)
        kinds = torch.randint(len(pairs.kinds), (loop.batch // 2,), generator=generator)
        better, worse, own = pairs.draw(kinds, generator)
        shown = labels.replace(condition=draw_conditions(loop.batch, generator))
        images = torch.cat([world.images(shown, generator), better, worse]).to(loop.device)
        texts = captions + world.captions(own)
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with fast(loop.device):
            seen, read = towers.images(images), towers.texts(tokens.to(loop.device))
        liked, disliked = ((half * read[loop.batch :]).sum(-1) for half in seen[loop.batch :].chunk(2))
        preference = -F.logsigmoid(towers.scale * (liked - disliked)).mean()
        true = matches(labels, templates)
        contrast = contrastive_loss(seen[: loop.batch], read[: loop.batch], towers.scale, true)
        accuracy = (liked > disliked).float().mean().item()
        return contrast + preference, {"contrast": contrast.item(), "accuracy": accuracy}

    ema = loop.train(towers, loss_of_step, peak_rate=8e-4, name=name)
    towers.load_state_dict(ema.values)
    with torch.no_grad():
        towers.model.logit_scale.copy_(towers.scale.log())
    {"pickscore": save_pickscore, "hpsv2": save_hpsv2}[name](towers, merges, loop.folder / f"tiny_{name}")


def save_pickscore(towers: RewardTowers, merges: list[tuple[str, str]], folder: Path) -> None:
    """Write the folder that PickScore.from_pretrained reads."""
    assert isinstance(towers.model, CLIPModel)
    towers.model.half().save_pretrained(folder)
    clip_tokenizer(merges).save_pretrained(folder)
    size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    CLIPImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder)


def save_hpsv2(towers: RewardTowers, merges: list[tuple[str, str]], folder: Path) -> None:
    """Write the folder that HPSv2.from_pretrained reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_open_clip_vocabulary(merges, folder / "bpe_simple_vocab.txt.gz")
    preprocess = {"size": 64, "mode": "RGB", "mean": CLIP_MEAN, "std": CLIP_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "longest", "fill_color": 0}
    config = {"model_cfg": open_clip_config(len(clip_tokenizer(merges))), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    weights = {key: value.half().contiguous() for key, value in towers.model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
