"""The network of ImageReward on the BLIP towers of transformers: its config, and the released weights' names.

The image goes through a ViT, the prompt through a BERT that attends to the image in every layer; the reward
is an affine map (`heads`) of the last hidden state at [CLS].
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from am_diffusers.rewards.parts.files import check_keys
from am_diffusers.rewards.parts.heads import PUBLISHED_WIDTHS, layered_head


@dataclass(frozen=True)
class ScorerConfig:
    """Sizes of the network and the scale of its output, as in config.json.

    Attributes:
        vision_config: arguments of `BlipVisionConfig`, the keys of `RELEASED` and no others.
        text_config: arguments of `BlipTextConfig`, the keys of `RELEASED` and no others.
        mlp_widths: widths of the four hidden layers of the head.
        context_length: tokens of a prompt that are read, [CLS] and [SEP] included.
        mean: mean of the head's output on the images of its training, subtracted from the output.
        std: standard deviation of that output, by which the output is divided.

    Raises:
        ValueError: if a key is missing or unknown, or `context_length` or `std` is out of range.
    """

    vision_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    mlp_widths: Sequence[int]
    context_length: int
    mean: float
    std: float

    def __post_init__(self) -> None:
        # A key that's left out would silently get transformers' default, for instance 8 heads instead of 12.
        for got, keys in ((self.vision_config, VISION_KEYS), (self.text_config, TEXT_KEYS)):
            if set(got) != keys:
                raise ValueError(f"expected the keys {sorted(keys)} of a BLIP tower, got {sorted(got)}")
        longest = self.text_config["max_position_embeddings"]
        if not 3 <= self.context_length <= longest:
            raise ValueError(f"expected a context_length in 3..{longest}, got {self.context_length}")
        if not self.std > 0:
            raise ValueError(f"expected a positive std, got {self.std}")


TOWER_KEYS = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
}
VISION_KEYS = TOWER_KEYS | {"image_size", "patch_size"}
TEXT_KEYS = TOWER_KEYS | {"vocab_size", "max_position_embeddings"}
RELEASED = ScorerConfig(
    vision_config={
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    text_config={
        "vocab_size": 30524,  # of bert-base-uncased, and two marks of BLIP's that ImageReward doesn't use
        "max_position_embeddings": 512,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
    mlp_widths=PUBLISHED_WIDTHS,
    context_length=35,
    mean=0.16717362830052426,
    std=1.0333394966054072,
)


class BlipScorer(nn.Module):
    """Network of both towers and the head.

    Args:
        config: sizes of the network.

    Raises:
        ValueError: if the sizes don't make a network.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        try:
            vision = BlipVisionConfig(**config.vision_config)
            # No text is generated, so none begins: the default token would be outside of a small vocabulary.
            text = BlipTextConfig(
                **config.text_config,
                encoder_hidden_size=vision.hidden_size,
                is_decoder=True,
                bos_token_id=None,
            )
            self.vision_model = BlipVisionModel(vision)
            self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
            self.mlp = layered_head(text.hidden_size, config.mlp_widths)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"these sizes don't make a BLIP network: {error}") from error

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return hidden states (B, 1 + patches, D) of prepared images, the class token first."""
        return self.vision_model(pixels).last_hidden_state

    def encode_pair(self, image: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden state (B, D) at [CLS] of prompts that attend to images.

        Args:
            image: result of `encode_image`.
            token_ids: token ids (B, L).
            mask: mask (B, L), 0 at padding.
        """
        # Not `is_decoder`: its layers have cross attention, but every token sees all others.
        output = self.text_encoder(token_ids, attention_mask=mask, encoder_hidden_states=image)
        return output.last_hidden_state[:, 0]


def read_config(file: Path) -> ScorerConfig:
    """Read the config.json of a folder.

    Raises:
        ValueError: if it isn't an ImageReward config.
    """
    try:
        return ScorerConfig(**json.loads(file.read_text("utf-8")))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} isn't an ImageReward config: {error}") from error


_BLOCK, _LAYER = r"blip\.visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
_KIND = r"\.(weight|bias)"
RENAMED = {
    r"blip\.visual_encoder\.cls_token": "vision_model.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed": "vision_model.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj" + _KIND: r"vision_model.embeddings.patch_embedding.\1",
    r"blip\.visual_encoder\.norm" + _KIND: r"vision_model.post_layernorm.\1",
    _BLOCK + r"norm([12])" + _KIND: _LAYER + r"layer_norm\2.\3",
    _BLOCK + r"attn\.qkv" + _KIND: _LAYER + r"self_attn.qkv.\2",
    _BLOCK + r"attn\.proj" + _KIND: _LAYER + r"self_attn.projection.\2",
    _BLOCK + r"mlp\.fc([12])" + _KIND: _LAYER + r"mlp.fc\2.\3",
    r"blip\.text_encoder\.(.+)": r"text_encoder.\1",
    r"mlp\.layers\.([02467])" + _KIND: r"mlp.layers.\1.\2",
}
# For BLIP's contrastive training, and 0, 1, 2, ...: no part of the score.
DROPPED = r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids"


def rename_released(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the released weights under the names of `BlipScorer`.

    Raises:
        ValueError: naming the keys that aren't ImageReward's.
    """
    renamed, unknown = {}, []
    for key, value in weights.items():
        if re.fullmatch(DROPPED, key):
            continue
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in RENAMED.items())
        names = [match.expand(name) for match, name in matches if match]
        if names:
            renamed[names[0]] = value
        else:
            unknown.append(key)
    check_keys(source, (), unknown)
    return renamed
