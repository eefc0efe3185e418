"""Stage `image_reward`: the small ImageReward, a network that reads image and caption together.

As BLIP is, both towers are trained contrastively (features of image and caption, each alone) while the
scores s(image, caption) of all images and captions of a small batch learn to pick the right ones; and on
preferences between images for one caption (Bradley-Terry), from a mixture of damage of its own.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer

from am_diffusers.rewards.image_reward import MARKS
from am_diffusers.rewards.parts.blip import BlipScorer, ScorerConfig
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat

from .contrastive import contrastive_loss, draw_captions, hard_batch, matches
from .loop import Loop, fast
from .preferences import SEEDS, Pairs, own_part
from .text import all_captions
from .world import World, draw_conditions

CONTEXT_LENGTH, FEATURES = 16, 128
HEAD_WIDTHS = (128, 64, 32, 16)
NAME = "image_reward"
SQUARE = 12  # images and captions of a step that are scored all against all
PAIRS = 24  # preference pairs of a step


def vocabulary(captions: list[str]) -> list[str]:
    """List BERT's marks, the words of the captions, and all letters, of which unknown words are made."""
    words = sorted({word for caption in captions for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", caption)})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    return list(dict.fromkeys([*MARKS, *words, *letters, *(f"##{letter}" for letter in letters)]))


def scorer_config(vocab_size: int) -> ScorerConfig:
    """Give the sizes of the small ImageReward: 64 pixels, 2.7 million parameters."""
    vision = {"image_size": 64, "patch_size": 8, "hidden_size": 192, "intermediate_size": 768}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    text = {"vocab_size": vocab_size, "max_position_embeddings": CONTEXT_LENGTH, "hidden_size": 128}
    text |= {"intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    return ScorerConfig(vision, text, HEAD_WIDTHS, CONTEXT_LENGTH, mean=0.0, std=1.0)


class PairScorer(nn.Module):
    """The network with its head evaluated layer by layer, and its tokenizer.

    Args:
        config: sizes.
        tokens: the vocabulary.
    """

    def __init__(self, config: ScorerConfig, tokens: list[str]) -> None:
        super().__init__()
        self.scorer = BlipScorer(config)
        self.tokenizer = BertTokenizer(vocab={token: row for row, token in enumerate(tokens)})
        self.format = PixelFormat(64, CLIP_MEAN, CLIP_STD)
        # For the contrastive part, not saved with the reward.
        self.of_image = nn.Linear(config.vision_config["hidden_size"], FEATURES)
        self.of_caption = nn.Linear(config.text_config["hidden_size"], FEATURES)
        self.log_scale = nn.Parameter(torch.tensor(2.7))

    def images(self, images: Tensor) -> Tensor:
        """Encode images to hidden states (B, 1 + patches, D) from (B, 3, 64, 64) in [0, 1]."""
        return self.scorer.encode_image(self.format.normalise(images))

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Look up token numbers (B, L) and mask of captions."""
        rows = self.tokenizer(captions, truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        device = self.log_scale.device
        return ids.to(device), mask.long().to(device)

    def caption_features(self, captions: list[str]) -> Tensor:
        """Encode captions to features (B, FEATURES), read without an image."""
        ids, mask = self.tokens(captions)
        return self.of_caption(self.scorer.text_encoder(ids, attention_mask=mask).last_hidden_state[:, 0])

    def forward(self, hidden: Tensor, captions: list[str]) -> Tensor:
        """Score B encoded images and captions, (B,)."""
        values = self.scorer.encode_pair(hidden, *self.tokens(captions))
        for layer in self.scorer.mlp["layers"].values():
            values = layer(values)
        return values[:, 0].float()


def train_image_reward(world: World, loop: Loop) -> None:
    """Train from scratch and save the reward to `tiny_image_reward` in the loop's folder."""
    pool, tokens = own_part(world, NAME), vocabulary(all_captions(world))
    torch.manual_seed(SEEDS[NAME])
    model = PairScorer(scorer_config(len(tokens)), tokens).to(loop.device)
    pairs = Pairs(world, pool, loop.folder)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(1_000_000 * SEEDS[NAME] + step)
        labels = hard_batch(world, loop.batch, generator, pool)
        captions, templates = draw_captions(world, labels, generator)
        shown = labels.replace(condition=draw_conditions(loop.batch, generator))
        kinds = torch.randint(len(pairs.kinds), (PAIRS,), generator=generator)
        better, worse, own = pairs.draw(kinds, generator)
        images = torch.cat([world.images(shown, generator), better, worse]).to(loop.device)
        with fast(loop.device):
            hidden = model.images(images)
            alone = model.of_image(hidden[: loop.batch, 0]), model.caption_features(captions)
            every = hidden[:SQUARE].repeat_interleave(SQUARE, 0)
            logits = model(every, captions[:SQUARE] * SQUARE).view(SQUARE, SQUARE)
            liked, disliked = model(hidden[loop.batch :], world.captions(own) * 2).chunk(2)
        true = matches(labels, templates).to(loop.device)
        contrast = contrastive_loss(*alone, model.log_scale.exp().clamp(max=50), true)
        matching = matching_loss(logits, true[:SQUARE, :SQUARE])
        preference = -F.logsigmoid(liked - disliked).mean()
        parts = {"contrast": contrast.item(), "matching": matching.item()}
        accuracy = (liked > disliked).float().mean().item()
        return contrast + matching + preference, parts | {"accuracy": accuracy}

    ema = loop.train(model, loss_of_step, peak_rate=6e-4, name=NAME)
    model.load_state_dict(ema.values)
    save_image_reward(model.cpu().eval(), world, tokens, loop.folder / "tiny_image_reward")


def matching_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Give the symmetric cross-entropy of scores (images, captions); other true captions are no negatives."""
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits, target = logits.masked_fill(true & ~own, -1e4), torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


@torch.no_grad()
def save_image_reward(model: PairScorer, world: World, tokens: list[str], folder: Path) -> None:
    """Write the folder that ImageReward.from_pretrained reads; real images have mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    labels = world.draw(512, generator).replace(condition=draw_conditions(512, generator))
    scores = model(model.images(world.images(labels, generator)), world.captions(labels))
    config = scorer_config(len(tokens))
    config = replace(config, mean=scores.mean().item(), std=scores.std().item())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    weights = {key: value.half().contiguous() for key, value in model.scorer.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
