"""ImageReward v1.0: `(w . h + b - mean) / std` of a BLIP model tuned on human preferences.

Xu et al. 2023, ImageReward, arXiv 2304.05977, scored as the image-reward package does: the preprocessing of
the CLIP package, 35 tokens of bert-base-uncased, h at an ordinary [CLS]. The network is `blip.BlipScorer`;
every size comes from the config, so a small one goes through the code of the released one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer

from am_diffusers.rewards.base import DIFFERENTIABLE, Column, RewardOptions
from am_diffusers.rewards.learned import FeatureReward, Skeleton
from am_diffusers.rewards.parts.blip import RELEASED, BlipScorer, ScorerConfig, read_config, rename_released
from am_diffusers.rewards.parts.files import (
    check_fit,
    find_file,
    load_strictly,
    read_weights,
    save_weights,
    state_dict_of,
)
from am_diffusers.rewards.parts.heads import collapse
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat, clip_package_crop

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "config.json", "model.safetensors", "vocab.txt"
RELEASED_VOCABULARY = "google-bert/bert-base-uncased/vocab.txt"
DOWNLOAD = "run `hf download THUDM/ImageReward ImageReward.pt` and give `THUDM/ImageReward/ImageReward.pt`"
DOWNLOAD_VOCABULARY = "run `hf download google-bert/bert-base-uncased vocab.txt` or give `vocabulary`"
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class ImageReward(FeatureReward):
    """ImageReward of images; about 0.85 for good ones. Build it with `from_pretrained`.

    Unlike with CLIP the text tower reads the image: nothing but the prompts' tokens can be remembered.

    Args:
        model: the network.
        config: sizes of the network, and the scale of its output.
        tokenizer: tokenizer of the text tower.
        options: settings of the reward.

    Raises:
        ValueError: if the tokenizer's vocabulary isn't the model's.
    """

    name = "image_reward"
    released = "THUDM/ImageReward/ImageReward.pt"
    column = Column("ImageReward", 2)

    def __init__(
        self,
        model: BlipScorer,
        *,
        config: ScorerConfig,
        tokenizer: BertTokenizer,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> None:
        vocab_size = config.text_config["vocab_size"]
        if not vocab_size - 2 <= len(tokenizer) <= vocab_size:  # BLIP's own two marks aren't in BERT's file
            raise ValueError(
                f"expected a vocabulary of {vocab_size - 2} to {vocab_size} tokens, got {len(tokenizer)}:"
                f" {VOCABULARY_FILE} of another model?"
            )
        # Before the model is cast: the head stays exact in half precision.
        self._head = collapse(model.mlp.state_dict(), "ImageReward", config.text_config["hidden_size"])
        super().__init__(model, options=options)
        self._scorer = model
        self._config = config
        self._tokenizer = tokenizer
        self._format = _pixel_format(config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
        vocabulary: str | Path | None = None,
    ) -> "ImageReward":
        """Load the released checkpoint, or a folder with a model of any size.

        Args:
            path: ImageReward.pt, or its hub address (`THUDM/ImageReward/ImageReward.pt`), or a folder with
                config.json (see `ScorerConfig`) and model.safetensors.
            revision: commit of the file on the hub.
            sha256: digest of the released file or of the folder's weights, checked before reading.
            options: settings of the reward.
            vocabulary: vocab.txt or its hub address; by default the folder's if it has one, else the one of
                bert-base-uncased.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit the model.
        """
        own = Path(path) / VOCABULARY_FILE
        vocabulary = vocabulary or (own if own.is_file() else RELEASED_VOCABULARY)
        tokenizer = _load_tokenizer(find_file(vocabulary, None, DOWNLOAD_VOCABULARY))
        if Path(path).is_dir():
            config, weights, source = _read_folder(Path(path), sha256)
        else:
            config, weights, source = _read_released(find_file(path, revision, DOWNLOAD), sha256)
        model = BlipScorer(config)
        load_strictly(model, weights, source)
        return cls(model, config=config, tokenizer=tokenizer, options=options)

    @classmethod
    def convert(cls, path: str | Path, folder: Path, sha256: str | None) -> None:
        """Write the released checkpoint as a folder, see `LearnedReward.convert`.

        The vocabulary isn't in the checkpoint: put a vocab.txt beside it, or bert-base-uncased's is used.
        """
        config, weights, source = _read_released(find_file(path, None, DOWNLOAD), sha256)
        with torch.device("meta"):
            check_fit(BlipScorer(config), weights, source)
        save_weights(weights, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2), "utf-8")

    @classmethod
    def skeleton(cls, path: str, *, revision: str | None, options: RewardOptions) -> Skeleton:
        """Return the reward without its weights, see `LearnedReward.skeleton`."""
        file = Path(path) / CONFIG_FILE
        config = read_config(file) if file.is_file() else RELEASED
        with torch.device("meta"):
            model = BlipScorer(config)

        def score(pixels: Tensor) -> Tensor:
            tokens = torch.ones(len(pixels), config.context_length, dtype=torch.long)
            pair = model.encode_pair(model.encode_image(pixels), tokens, tokens)
            return pair.float().mean(-1)  # the head is one affine function

        return Skeleton(cls.name, model, pixels=_pixel_format(config).crop, score=score, options=options)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt that are read, [CLS] and [SEP] included."""
        return self._config.context_length

    def _pixels(self, images: Tensor) -> Tensor:
        return self._format.normalise(clip_package_crop(images, self._format.size, self.options.mode))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self._scorer.encode_image(pixels)[:, 0]

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pair = self._scorer.encode_pair(self._scorer.encode_image(pixels), *self._token_batch(prompts))
        return (self._head(pair) - self._config.mean) / self._config.std

    def _token_batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids (B, L) padded to the longest prompt, and a mask; padding doesn't change scores."""
        rows = self._once_a_prompt(prompts, self._tokens)
        token_ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
        return token_ids.to(self.options.device), mask.long().to(self.options.device)

    def _tokens(self, prompt: str) -> Tensor:
        """Return the token ids (L,) of a prompt, cut to what is read."""
        whole = self._tokenizer(prompt, verbose=False)["input_ids"]
        self._count_truncated(prompt, len(whole), self.context_length)
        cut = self._tokenizer(prompt, truncation=True, max_length=self.context_length)["input_ids"]
        return torch.tensor(cut)


def _pixel_format(config: ScorerConfig) -> PixelFormat:
    return PixelFormat(config.vision_config["image_size"], CLIP_MEAN, CLIP_STD)


def _read_folder(folder: Path, sha256: str | None) -> tuple[ScorerConfig, dict[str, Tensor], str]:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found in {folder}; for the released model {DOWNLOAD}")
    config = read_config(folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    return config, state_dict_of(read_weights(file, sha256, DOWNLOAD), file, DOWNLOAD), str(file)


def _read_released(file: Path, sha256: str | None) -> tuple[ScorerConfig, dict[str, Tensor], str]:
    weights = state_dict_of(read_weights(file, sha256, DOWNLOAD), file, DOWNLOAD)
    return RELEASED, rename_released(weights, str(file)), str(file)


def _load_tokenizer(vocabulary: Path) -> BertTokenizer:
    """Make BERT's uncased tokenizer; transformers 5 would silently ignore a `vocab_file`."""
    tokens = vocabulary.read_text("utf-8").rstrip("\n").split("\n")
    if len(set(tokens)) < len(tokens) or not {*MARKS} <= {*tokens}:
        raise ValueError(
            f"{vocabulary} isn't a BERT vocabulary: expected one different token a line and"
            f" {', '.join(MARKS)} among them; {DOWNLOAD_VOCABULARY}"
        )
    return BertTokenizer(vocab={token: row for row, token in enumerate(tokens)})
