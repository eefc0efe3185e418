"""The rewards at their released widths, one layer a tower, without data and with small vocabularies."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from am_diffusers.estimate.pretend import remove_data
from am_diffusers.rewards import LearnedReward, RewardOptions
from am_diffusers.rewards.hpsv2 import RELEASED_ARCHITECTURE, HPSv2
from am_diffusers.rewards.image_reward import ImageReward
from am_diffusers.rewards.parts.blip import RELEASED, BlipScorer
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat
from am_diffusers.rewards.pickscore import PickScore
from reward_models import bert_vocabulary, spelled_merges, vocabulary

Network = TypeVar("Network", bound=nn.Module)
ONE_LAYER = {"num_hidden_layers": 1}


def pickscore(mode: FakeTensorMode) -> Callable[[RewardOptions], LearnedReward]:
    """Return what makes the reward once its options are known."""
    merges: Any = spelled_merges()
    vocab = vocabulary(merges, "<|startoftext|>", "<|endoftext|>")
    ids = {"vocab_size": len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    sizes = PickScore.released_sizes
    config = CLIPConfig(
        vision_config=sizes["vision_config"] | ONE_LAYER,
        text_config=sizes["text_config"] | ONE_LAYER | ids,
        projection_dim=sizes["projection_dim"],
    )
    model = _without_data(lambda: CLIPModel(config), mode)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    processor = CLIPImageProcessorPil()
    return lambda options: PickScore(model, tokenizer=tokenizer, image_processor=processor, options=options)


def hpsv2(mode: FakeTensorMode) -> Callable[[RewardOptions], LearnedReward]:
    """Return what makes the reward once its options are known."""
    config = get_model_config(RELEASED_ARCHITECTURE)
    assert config is not None
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    model, pixels = _without_data(lambda: CLIP(**config), mode), PixelFormat(224, CLIP_MEAN, CLIP_STD)
    return lambda options: HPSv2(model, tokenizer=SimpleTokenizer(), pixel_format=pixels, options=options)


def image_reward(mode: FakeTensorMode) -> Callable[[RewardOptions], LearnedReward]:
    """Return what makes the reward once its options are known."""
    words = bert_vocabulary()
    config = replace(
        RELEASED,
        vision_config={**RELEASED.vision_config, **ONE_LAYER},
        text_config={**RELEASED.text_config, **ONE_LAYER, "vocab_size": len(words) + 2},
    )
    model = _without_data(lambda: BlipScorer(config), mode)
    tokenizer = BertTokenizer(vocab={word: row for row, word in enumerate(words)})
    return lambda options: ImageReward(model, config=config, tokenizer=tokenizer, options=options)


def _without_data(make: Callable[[], Network], mode: FakeTensorMode) -> Network:
    with torch.device("meta"):
        network = make()
    remove_data(network, mode)
    return network


SHALLOW = {"pickscore": pickscore, "hpsv2": hpsv2, "image_reward": image_reward}
