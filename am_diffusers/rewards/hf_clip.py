"""Rewards that are a `CLIPModel` of transformers: folders read strictly, published preprocessing and tokens.

Scored as their model cards do: bicubic resize of the shortest edge, centre crop, the CLIP tokenizer of
transformers. Every size and the activation (`hidden_act`) come from the files, so a small CLIP model goes
through the code of the released ones.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.learned import DIFFERENTIABLE, RewardOptions
from am_diffusers.rewards.parts.files import refuse_sha256
from am_diffusers.rewards.parts.hf_files import check_model_type, download_remedy, load_pretrained
from am_diffusers.rewards.parts.preprocess import PixelFormat, shortest_edge_crop, to_pil

R = TypeVar("R", bound="HfClipReward")


class HfClipReward(ClipReward):
    """A cosine of a CLIP model in transformers' layout.

    Args:
        model: the CLIP model.
        tokenizer: its tokenizer.
        image_processor: the published preprocessing, whose sizes the differentiable one shares.
        options: how it runs.

    Attributes:
        default_processor: hub id of tokenizer and preprocessing; None = published with the weights.

    Raises:
        ValueError: if tokenizer or preprocessing don't belong to the model.
    """

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
        """What the cosine is multiplied with."""

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
        """Load a folder of `CLIPModel.save_pretrained` or a hub id such as that of `released`.

        Args:
            path: folder or hub id of the weights (safetensors).
            revision: commit of the weights on the hub.
            sha256: not used, the weights are no pickle; must be None.
            options: how it runs.
            processor: folder or hub id of tokenizer and preprocessor_config.json; by default `path` itself
                when it is a folder that holds them, else `default_processor`.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or isn't a CLIP model.
        """
        refuse_sha256(cls.__name__, sha256)
        remedy = download_remedy(cls.released)
        check_is_clip(str(path), revision, cls.__name__, remedy)
        own = (Path(path) / "preprocessor_config.json").is_file()
        place = processor or (None if own else cls.default_processor)
        tokenizer, image_processor = (
            cls._load_processor(path, revision) if place is None else cls._load_processor(place, None)
        )
        model = load_clip(str(path), revision, cls.__name__, remedy)
        return cls(model, tokenizer=tokenizer, image_processor=image_processor, options=options)

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


def check_is_clip(path: str, revision: str | None, reward: str, remedy: str) -> None:
    """Raise ValueError unless there is a CLIP config, see `check_model_type`."""
    check_model_type("CLIP", path, revision, reward, remedy)


def load_clip(path: str, revision: str | None, reward: str, remedy: str) -> CLIPModel:
    """The CLIP model in a folder or on the hub, in float32, see `load_pretrained`."""
    return load_pretrained(CLIPModel, path, revision, reward, remedy)


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
