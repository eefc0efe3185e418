"""Rewards that compare an image with a prompt by two towers: `scale * cos(image features, text features)`.

`ClipReward` is what all of them share. `HfClipReward` is a `CLIPModel` of transformers, scored as the model
cards do: bicubic resize of the shortest edge, centre crop, the CLIP tokenizer. Every size and the activation
(`hidden_act`) come from the files, so a small CLIP model goes through the code of the released ones.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from am_diffusers.rewards.base import DIFFERENTIABLE, RewardOptions, check_prompts
from am_diffusers.rewards.learned import FeatureReward, Skeleton, unit_length
from am_diffusers.rewards.parts.files import refuse_sha256
from am_diffusers.rewards.parts.hf_files import (
    check_model_type,
    clip_skeleton,
    download_remedy,
    load_pretrained,
)
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat, to_pil

R = TypeVar("R", bound="HfClipReward")


class ClipReward(FeatureReward):
    """Reward that compares the image and text features of a frozen two-tower model.

    Text features are computed once per prompt, without gradients.

    Args:
        network: both towers; frozen, set to evaluation and moved in place.
        scale: factor of the cosine.
        options: settings of the reward.

    Attributes:
        scale: factor of the cosine.
    """

    def __init__(self, network: nn.Module, *, scale: float, options: RewardOptions) -> None:
        super().__init__(network, options=options)
        self.scale = scale

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens that the text tower reads, begin and end marks included."""

    @abstractmethod
    def _num_tokens(self, prompt: str) -> int:
        """Count the tokens of `prompt` before truncation, begin and end marks included."""

    @abstractmethod
    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return text features before normalisation, (B, D); prompts are cut as the published scorer does."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return features (B, D) of length 1 of the prompts, without gradients."""
        check_prompts(prompts, len(prompts))
        return torch.stack(self._once_a_prompt(prompts, self._text_features))

    def _text_features(self, prompt: str) -> Tensor:
        self._count_truncated(prompt, self._num_tokens(prompt), self.context_length)
        return unit_length(self._encode_prompts([prompt]))[0]

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self._features(pixels) * self.text_features(prompts)).sum(-1)


class HfClipReward(ClipReward):
    """Cosine of a CLIP model in transformers' layout.

    Args:
        model: the CLIP model.
        tokenizer: tokenizer of the model.
        image_processor: the published preprocessing, whose sizes the differentiable one shares.
        options: settings of the reward.

    Attributes:
        released_sizes: sizes of the released model, see `clip_sizes`.
        default_processor: hub id of tokenizer and preprocessing; None = published with the weights.

    Raises:
        ValueError: if tokenizer or preprocessing don't belong to the model.
    """

    released_sizes: ClassVar[Mapping[str, Any]]
    default_processor: ClassVar[str | None]

    def __init__(
        self,
        model: CLIPModel,
        *,
        tokenizer: CLIPTokenizer,
        image_processor: CLIPImageProcessorPil,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> None:
        self._format = _pixel_format(image_processor, model.config)
        text_config: Any = model.config.text_config
        _check_tokenizer(tokenizer, text_config)
        # Before the model is cast: bfloat16 would change exp(4.6) by a percent.
        super().__init__(model, scale=self._scale(model), options=options)
        self._clip = model
        self._tokenizer = tokenizer
        self._context_length = text_config.max_position_embeddings
        self._image_processor = image_processor

    @classmethod
    @abstractmethod
    def _scale(cls, model: CLIPModel) -> float:
        """Return the factor of the cosine."""

    @classmethod
    def from_pretrained(
        cls: type[R],
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
        processor: str | Path | None = None,
    ) -> R:
        """Load a folder of `CLIPModel.save_pretrained` or a hub id such as `released`.

        Args:
            path: folder or hub id of the weights (safetensors).
            revision: commit of the weights on the hub.
            sha256: must be None: the weights are no pickle.
            options: settings of the reward.
            processor: folder or hub id of tokenizer and preprocessor_config.json; by default `path` itself
                when it is a folder that holds them, else `default_processor`.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or isn't a CLIP model.
        """
        refuse_sha256(cls.__name__, sha256)
        remedy = download_remedy(cls.released)
        check_model_type("CLIP", str(path), revision, cls.__name__, remedy)
        own = (Path(path) / "preprocessor_config.json").is_file()
        place = processor or (None if own else cls.default_processor)
        tokenizer, image_processor = (
            cls._load_processor(path, revision) if place is None else cls._load_processor(place, None)
        )
        model = load_pretrained(CLIPModel, str(path), revision, cls.__name__, remedy)
        return cls(model, tokenizer=tokenizer, image_processor=image_processor, options=options)

    @classmethod
    def skeleton(cls, path: str, *, revision: str | None, options: RewardOptions) -> Skeleton:
        """Return the reward without its weights, see `LearnedReward.skeleton`."""
        clip: Any = clip_skeleton(path, revision, {cls.released: cls.released_sizes})

        def score(pixels: Tensor) -> Tensor:
            return without_text(clip.get_image_features(pixels).pooler_output)

        return Skeleton(cls.name, clip, pixels=clip_format(clip).crop, score=score, options=options)

    @classmethod
    def _load_processor(
        cls, path: str | Path, revision: str | None
    ) -> tuple[CLIPTokenizer, CLIPImageProcessorPil]:
        try:
            at = revision or "main"
            tokenizer = CLIPTokenizer.from_pretrained(path, revision=at)
            return tokenizer, CLIPImageProcessorPil.from_pretrained(path, revision=at)
        except OSError as error:
            raise ValueError(
                f"{cls.__name__}'s tokenizer or preprocessor_config.json not found at {str(path)!r}: run `hf"
                f" download {cls.default_processor or cls.released} --include '*.json' 'merges.txt'` or give"
                " `processor`"
            ) from error

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads, begin and end marks included."""
        return self._context_length

    def _pixels(self, images: Tensor) -> Tensor:
        if self.options.mode == "official":
            return self._image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        return self._format.crop(images, rounded=self.options.mode == "rounded")

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        output: Any = self._clip.get_image_features(pixels)
        return output.pooler_output

    def _num_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(prompt, verbose=False)["input_ids"])

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        ).to(self.options.device)
        output: Any = self._clip.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return output.pooler_output


def clip_format(clip: CLIPModel) -> PixelFormat:
    """Return CLIP's published preprocessing for a model whose preprocessor_config.json isn't read."""
    config: Any = clip.config.vision_config
    return PixelFormat(config.image_size, CLIP_MEAN, CLIP_STD)


def without_text(features: Tensor) -> Tensor:
    """Return scores (B,) of image features before normalisation against text features of 0."""
    return (unit_length(features) * torch.zeros_like(features)).sum(-1)


def _pixel_format(processor: Any, config: Any) -> PixelFormat:
    """Return sizes and normalisation of the published preprocessing once it is known to be CLIP's."""
    size = config.vision_config.image_size
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    expected = {"resize": size, "crop": (size, size), "resample": PILImageResampling.BICUBIC, "steps": steps}
    got = {
        "resize": processor.size["shortest_edge"],
        "crop": (processor.crop_size["height"], processor.crop_size["width"]),
        "resample": processor.resample,
        "steps": tuple(step for step in steps if getattr(processor, step)),
    }
    if got != expected:
        raise ValueError(f"expected CLIP's preprocessing {expected}, got {got}: another model's?")
    return PixelFormat(size, tuple(processor.image_mean), tuple(processor.image_std))


def _check_tokenizer(tokenizer: CLIPTokenizer, config: Any) -> None:
    """Check the end mark, at which the text tower pools: with another it would silently pool elsewhere."""
    # eos_token_id 2 is an old mistake in released configs: transformers then pools at the highest token id.
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"expected a tokenizer of at most {config.vocab_size} tokens with end mark {end},"
            f" got {len(tokenizer)} tokens with end mark {tokenizer.eos_token_id}: another model's?"
        )
