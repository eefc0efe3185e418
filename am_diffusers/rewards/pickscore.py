"""PickScore: `exp(logit_scale) * cos(image, text)` of a CLIP model tuned on human choices.

Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569, scored as its model card does: bicubic resize of the
shortest edge, centre crop, the CLIP tokenizer of transformers. The released model is a ViT-H/14; every size
comes from the files, so a small CLIP model goes through the same code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.files import check_keys, refuse_sha256
from am_diffusers.rewards.learned import DIFFERENTIABLE, RewardOptions
from am_diffusers.rewards.preprocess import PixelFormat, shortest_edge_crop, to_pil

DEFAULT_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DOWNLOAD = "run `hf download yuvalkirstain/PickScore_v1` and give that name, or a folder that holds the files"
# Buffers (0, 1, 2, ...) that transformers < 4.31 saved with the weights; 5.4 still calls them unexpected.
OLD_BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}


class PickScore(ClipReward):
    """PickScore of pictures; about 20-24 for the released model. Build it with `from_pretrained`.

    Args:
        model: the CLIP model.
        tokenizer: its tokenizer.
        image_processor: the published preprocessing, whose sizes the differentiable one shares.
        options: how it runs.

    Raises:
        ValueError: if tokenizer or preprocessing don't belong to the model.
    """

    name = "pickscore"
    released = "yuvalkirstain/PickScore_v1"

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
        super().__init__(model, scale=model.logit_scale.exp().item(), options=options)
        self._clip = model
        self._tokenizer = tokenizer
        self._context_length = text_config.max_position_embeddings
        self._image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
        processor: str | Path | None = None,
    ) -> "PickScore":
        """Load a folder of `CLIPModel.save_pretrained` or a hub id such as yuvalkirstain/PickScore_v1.

        Args:
            path: folder or hub id of the weights (safetensors).
            revision: commit of the weights on the hub.
            sha256: not used, the weights are no pickle; must be None.
            options: how it runs.
            processor: folder or hub id of tokenizer and preprocessor_config.json; by default `path` itself
                when it is a folder that holds them, else `DEFAULT_PROCESSOR`.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or isn't a CLIP model.
        """
        refuse_sha256(cls.name, sha256)
        _check_is_clip(str(path), revision)
        own = (Path(path) / "preprocessor_config.json").is_file()
        tokenizer, image_processor = _load_processor(processor or (path if own else DEFAULT_PROCESSOR))
        model = _load_model(str(path), revision)
        return cls(model, tokenizer=tokenizer, image_processor=image_processor, options=options)

    @property
    def context_length(self) -> int:
        """Tokens the text tower reads, begin and end marks included."""
        return self._context_length

    def _pixels(self, images: Tensor) -> Tensor:
        if self.options.mode == "official":
            return self._image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        cropped = shortest_edge_crop(images, self._format.size, rounded=self.options.mode == "rounded")
        return self._format.normalise(cropped)

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


def _load_processor(path: str | Path) -> tuple[CLIPTokenizer, CLIPImageProcessorPil]:
    try:
        return CLIPTokenizer.from_pretrained(path), CLIPImageProcessorPil.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"PickScore's tokenizer or preprocessor_config.json not found at {str(path)!r}: run"
            f" `hf download {DEFAULT_PROCESSOR} --include '*.json' 'merges.txt'` or give `processor`"
        ) from error


def _check_is_clip(path: str, revision: str | None) -> None:
    """Cheap, so that a wrong path or model is known before gigabytes are read."""
    try:
        kind = CLIPConfig.get_config_dict(path, revision=revision)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"PickScore's config.json not found at {path!r}: {DOWNLOAD}") from error
    if kind != "clip":
        raise ValueError(
            f"expected a CLIP model for PickScore, got model_type {kind!r} in {path}: {DOWNLOAD}"
        )


def _load_model(path: str, revision: str | None) -> CLIPModel:
    load: Any = CLIPModel.from_pretrained  # its annotations leave out the loading info
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, info = load(path, revision=revision, **options)
    except OSError as error:
        raise ValueError(f"PickScore's model.safetensors not found at {path!r}: {DOWNLOAD}") from error
    except SafetensorError as error:
        raise ValueError(f"PickScore's weights in {path} are damaged ({error}): {DOWNLOAD}") from error
    except RuntimeError as error:  # transformers' way of saying that shapes differ from the config
        raise ValueError(f"the weights in {path} don't fit its config.json: {error}") from error
    check_keys(path, info["missing_keys"], set(info["unexpected_keys"]) - OLD_BUFFERS)
    return model


def _pixel_format(processor: Any, config: Any) -> PixelFormat:
    """Sizes and normalisation of the published preprocessing, once it is known to be CLIP's."""
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
    """The text tower pools at the end mark; a tokenizer with another one would silently pool elsewhere."""
    # eos_token_id 2 is an old mistake in released configs: transformers then pools at the highest token id.
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"expected a tokenizer of at most {config.vocab_size} tokens with end mark {end},"
            f" got {len(tokenizer)} tokens with end mark {tokenizer.eos_token_id}: another model's?"
        )
