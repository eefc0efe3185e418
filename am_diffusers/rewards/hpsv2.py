"""HPSv2 and HPSv2.1: `cos(image, text)` of an open_clip model tuned on human preferences.

Wu et al. 2023, Human Preference Score v2, arXiv 2306.09341, scored as the hpsv2 package does: the tensor is
resized (bicubic, longest edge) and padded with black to a square before it is normalised. That package's
numbers depend on torchvision: before 0.17 tensors were resized without antialiasing; this module always
antialiases. Every size comes from the config: a small open_clip model goes through the code of the ViT-H/14.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from am_diffusers.rewards.base import DIFFERENTIABLE, Column, RewardOptions
from am_diffusers.rewards.clip import ClipReward, without_text
from am_diffusers.rewards.learned import Skeleton
from am_diffusers.rewards.parts.files import (
    check_fit,
    find_file,
    load_strictly,
    read_weights,
    save_weights,
    state_dict_of,
)
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat, longest_edge_pad

RELEASED_ARCHITECTURE = "ViT-H-14"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
VOCABULARY_FILE = "bpe_simple_vocab.txt.gz"
DOWNLOAD = "run `hf download xswu/HPSv2 HPS_v2.1_compressed.pt` and give `xswu/HPSv2/HPS_v2.1_compressed.pt`"


class HPSv2(ClipReward):
    """HPSv2 score of images; about 0.28 for the released models. Build it with `from_pretrained`.

    Args:
        model: the open_clip model.
        tokenizer: tokenizer of the model.
        pixel_format: input size and normalisation of the vision tower.
        options: settings of the reward.

    Raises:
        ValueError: if the tokenizer's vocabulary isn't the model's.
    """

    name = "hpsv2"
    released = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    column = Column("HPSv2", 3)

    def __init__(
        self,
        model: CLIP,
        *,
        tokenizer: SimpleTokenizer,
        pixel_format: PixelFormat,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> None:
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(
                f"expected a vocabulary of {model.vocab_size} tokens, got {tokenizer.vocab_size}:"
                f" {VOCABULARY_FILE} of another model, or a line break at its end?"
            )
        super().__init__(model, scale=1.0, options=options)
        self._clip = model
        self._tokenizer = tokenizer
        self._format = pixel_format

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> "HPSv2":
        """Load a released checkpoint (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt) or an open_clip folder.

        Args:
            path: the .pt file, or its hub address (`xswu/HPSv2/HPS_v2.1_compressed.pt`), or a folder with
                open_clip_config.json, open_clip_model.safetensors and, unless the model uses CLIP's own
                vocabulary, bpe_simple_vocab.txt.gz.
            revision: commit of the file on the hub.
            sha256: digest of the released file or of the folder's weights, checked before reading.
            options: settings of the reward.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit the model.
        """
        if Path(path).is_dir():
            model, pixel_format = _load_folder(Path(path), sha256)
        else:
            model, pixel_format = _load_released(find_file(path, revision, DOWNLOAD), sha256)
        tokenizer = _load_tokenizer(Path(path) / VOCABULARY_FILE, model.context_length)
        return cls(model, tokenizer=tokenizer, pixel_format=pixel_format, options=options)

    @classmethod
    def convert(cls, path: str | Path, folder: Path, sha256: str | None) -> None:
        """Write a released .pt file as an open_clip folder, in its own precision, see `LearnedReward`."""
        file = find_file(path, None, DOWNLOAD)
        config, weights = _read_released(file, sha256)
        with torch.device("meta"):
            check_fit(CLIP(**config), weights, str(file))
        preprocessing = {
            "mean": CLIP_MEAN,
            "std": CLIP_STD,
            "interpolation": "bicubic",
            "resize_mode": "longest",
        }
        save_weights(weights, folder / WEIGHTS_FILE)
        document = {"model_cfg": config, "preprocess_cfg": preprocessing}
        (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2), "utf-8")

    @classmethod
    def skeleton(cls, path: str, *, revision: str | None, options: RewardOptions) -> Skeleton:
        """Return the reward without its weights, see `LearnedReward.skeleton`."""
        file = Path(path) / CONFIG_FILE
        config = json.loads(file.read_text())["model_cfg"] if file.is_file() else _released_config()
        with torch.device("meta"):
            model = CLIP(**config)
        pixel_format = PixelFormat(config["vision_cfg"]["image_size"], CLIP_MEAN, CLIP_STD)

        def pixels(images: Tensor) -> Tensor:
            return pixel_format.normalise(longest_edge_pad(images, pixel_format.size))

        def score(pixels: Tensor) -> Tensor:
            return without_text(model.encode_image(pixels))

        return Skeleton(cls.name, model, pixels=pixels, score=score, options=options)

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads, begin and end marks included."""
        return self._clip.context_length

    def _pixels(self, images: Tensor) -> Tensor:
        # The published path turns the 8-bit image into a tensor first: rounding is all that differs.
        rounded = self.options.mode != "differentiable"
        return self._format.normalise(longest_edge_pad(images, self._format.size, rounded=rounded))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self._clip.encode_image(pixels)

    def _num_tokens(self, prompt: str) -> int:
        return len(self._tokenizer.encode(prompt)) + 2

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return self._clip.encode_text(self._tokenizer(list(prompts)).to(self.options.device))


def _load_folder(folder: Path, sha256: str | None) -> tuple[CLIP, PixelFormat]:
    """Load model and preprocessing of a folder as open_clip writes it for the hub."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found in {folder}; for the released model {DOWNLOAD}")
    model_config, pixel_format = _read_config(folder / CONFIG_FILE)
    weights = read_weights(folder / WEIGHTS_FILE, sha256, DOWNLOAD)
    return _build(model_config, weights, str(folder)), pixel_format


def _read_config(file: Path) -> tuple[dict[str, Any], PixelFormat]:
    """Read `model_cfg` and preprocessing of an open_clip_config.json, and check that they are HPSv2's."""
    try:
        config = json.loads(file.read_text())
        model_config, preprocessing = config["model_cfg"], config["preprocess_cfg"]
        size = model_config["vision_cfg"]["image_size"]
        pixel_format = PixelFormat(size, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} isn't an open_clip config: {error!r}") from error
    expected = {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 0, "size": size}
    got = {key: preprocessing.get(key, value) for key, value in expected.items()}
    if got != expected:
        raise ValueError(f"expected HPSv2's preprocess_cfg {expected} in {file}, got {got}")
    return model_config, pixel_format


def _load_released(file: Path, sha256: str | None) -> tuple[CLIP, PixelFormat]:
    """Load model and preprocessing of a released .pt file."""
    config, weights = _read_released(file, sha256)
    pixel_format = PixelFormat(config["vision_cfg"]["image_size"], CLIP_MEAN, CLIP_STD)
    return _build(config, weights, str(file)), pixel_format


def _read_released(file: Path, sha256: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read `model_cfg` and weights of a released .pt file."""
    content = read_weights(file, sha256, DOWNLOAD)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{file} isn't a released HPSv2 checkpoint: no `state_dict` in it; {DOWNLOAD}")
    return _released_config(), state_dict_of(content["state_dict"], file, DOWNLOAD)


def _released_config() -> dict[str, Any]:
    config = open_clip.get_model_config(RELEASED_ARCHITECTURE)
    assert config is not None, "open_clip ships ViT-H-14"
    return config


def _build(config: dict[str, Any], weights: dict[str, Tensor], source: str) -> CLIP:
    try:
        model = CLIP(**config)
    except TypeError as error:
        raise ValueError(f"{source}: `model_cfg` doesn't describe an open_clip CLIP: {error}") from error
    load_strictly(model, weights, source)
    return model


def _load_tokenizer(vocabulary: Path, context_length: int) -> SimpleTokenizer:
    """Load the folder's own vocabulary if it has one, else CLIP's, which open_clip ships."""
    if vocabulary.is_file():
        return SimpleTokenizer(bpe_path=str(vocabulary), context_length=context_length)
    return SimpleTokenizer(context_length=context_length)
