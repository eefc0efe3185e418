"""OCR: log-probability per character that a text recogniser reads the text quoted in the prompt.

`log p(text | image) / len(text)` in nats per character, at most 0, by connectionist temporal classification
(Graves et al. 2006): p(text) sums over all paths of characters and blanks that spell the text. The recogniser
is PP-OCRv4 (Chinese and Latin letters, digits, punctuation), shipped by the package rapidocr-onnxruntime; its
ONNX graph runs in torch. The image as a whole is one line of text: this suits wide images of a word, not a
sign somewhere in a scene.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss

from am_diffusers.rewards.base import DIFFERENTIABLE, RewardOptions, check_images
from am_diffusers.rewards.learned import LearnedReward
from am_diffusers.rewards.parts.files import check_sha256, find_file
from am_diffusers.rewards.parts.onnx_graph import OnnxGraph, read_graph
from am_diffusers.rewards.parts.packaged import PREFIX, RAPIDOCR, load_module
from am_diffusers.rewards.parts.text_line import official_text_line, text_line

BLANK = 0
# Double quotes first: an apostrophe is no quote, and a prompt may have both.
QUOTES = (r'"([^"]+)"|“([^“”]+)”', r"\u2018(.+?)\u2019(?!\w)|(?<!\w)'(.+?)'(?!\w)")


class OCR(LearnedReward):
    """Log-probability per character of the quoted text. Build it with `from_pretrained`.

    Args:
        model: text lines (B, 3, 48, W) to logits (B, frames, characters); a frame is 8 columns.
        characters: characters of the classes 1, 2, ...; class 0 is the blank.
        options: settings of the reward.
    """

    name = "ocr"
    released = PREFIX + RAPIDOCR.package

    def __init__(
        self, model: OnnxGraph, *, characters: Sequence[str], options: RewardOptions = DIFFERENTIABLE
    ) -> None:
        super().__init__(model, options=options)
        self._characters = list(characters)
        self._class_of = {character: row + 1 for row, character in enumerate(characters)}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> "OCR":
        """Load the recogniser of the installed rapidocr-onnxruntime, or another PP-OCR recogniser.

        Args:
            path: by default the package's file; else an .onnx file with its characters in its metadata.
            revision: commit of a file on the hub.
            sha256: digest of the file, checked before reading; None = the pinned one of the package's file.
            options: settings of the reward.

        Raises:
            ValueError: if a package is missing (with the command that installs it) or the file doesn't fit.
        """
        if str(path) == cls.released:
            file, sha256 = RAPIDOCR.find(), sha256 or RAPIDOCR.sha256
        else:
            file = find_file(path, revision, f"{RAPIDOCR.remedy} and give `{cls.released}`, or an .onnx file")
        check_sha256(file, sha256)
        model, characters = _read_recogniser(file)
        return cls(model, characters=characters, options=options)

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt without quoted text or with characters the recogniser lacks."""
        for prompt in dict.fromkeys(prompts):
            self._classes(prompt)

    def read(self, images: Tensor) -> list[str]:
        """Return the most probable text of each image (B, 3, H, W) in [0, 1], frame by frame (greedily)."""
        check_images(images)
        with torch.no_grad():
            best = self._in_parts(lambda p, _: self._log_probs(p).argmax(-1), images, [""] * len(images))
        lines = [torch.unique_consecutive(row).tolist() for row in best]
        return ["".join(self._characters[i - 1] for i in line if i != BLANK) for line in lines]

    def _pixels(self, images: Tensor) -> Tensor:
        if self.options.mode == "official":
            return official_text_line(images)
        return text_line(images, rounded=self.options.mode == "rounded")

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        classes = [self._classes(prompt) for prompt in prompts]  # before the network: they may be refused
        log_probs = self._log_probs(pixels)
        for prompt, target in zip(prompts, classes, strict=True):
            _check_length(prompt, target, log_probs.shape[1])
        lengths = torch.tensor([len(target) for target in classes], device=log_probs.device)
        loss = ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([row for target in classes for row in target], device=log_probs.device),
            torch.full_like(lengths, log_probs.shape[1]),
            lengths,
            blank=BLANK,
            reduction="none",
            zero_infinity=False,
        )
        return -loss / lengths

    def _log_probs(self, pixels: Tensor) -> Tensor:
        """Return log-probabilities (B, frames, characters + 1), in float32 or better."""
        logits = self.network(pixels)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _classes(self, prompt: str) -> list[int]:
        """Return the classes of the characters that the prompt quotes."""
        text = quoted_text(prompt)
        unknown = sorted({character for character in text if character not in self._class_of})
        if unknown:
            raise ValueError(
                f"ocr: the recogniser doesn't know {unknown} in {prompt!r}: leave these characters out"
            )
        return [self._class_of[character] for character in text]


def quoted_text(prompt: str) -> str:
    """Return the text between the first pair of double quotes, or of single ones if there are no double ones.

    Raises:
        ValueError: if nothing is quoted.
    """
    for pattern in QUOTES:
        if match := re.search(pattern, prompt):
            text = next(group for group in match.groups() if group).strip()
            if text:
                return text
    raise ValueError(f'ocr: no quoted text in {prompt!r}: write it in quotes, as in: a sign that says "OPEN"')


def _check_length(prompt: str, target: Sequence[int], frames: int) -> None:
    """Check that there is a frame for each character and between equal neighbours, as CTC needs."""
    needed = len(target) + sum(a == b for a, b in pairwise(target))
    if needed > frames:
        raise ValueError(
            f"ocr: the quotation in {prompt!r} needs {needed} frames of 8 columns, the line of the image has"
            f" {frames}: use a shorter text or a wider image"
        )


def _read_recogniser(file: Path) -> tuple[OnnxGraph, list[str]]:
    """Read the graph without its closing softmax, and the characters of classes 1, 2, ..."""
    onnx: Any = load_module("onnx", RAPIDOCR.remedy)
    try:
        model = onnx.load(file)
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version
        raise ValueError(f"{file} is damaged or isn't an ONNX model: {error}") from error
    metadata = {item.key: item.value for item in model.metadata_props}
    # The space is the last class and not in the list, as in rapidocr_onnxruntime's CTCLabelDecode.
    characters = [*metadata.get("character", "").splitlines(), " "]
    if not model.graph.node or model.graph.node[-1].op_type != "Softmax":
        raise ValueError(f"{file} isn't a PP-OCR recogniser: its graph doesn't end with a softmax")
    classes = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    if classes != len(characters) + 1:
        raise ValueError(f"{file}: {classes} classes but {len(characters)} characters and a blank")
    model.graph.node.pop()
    return read_graph(model, onnx), characters
