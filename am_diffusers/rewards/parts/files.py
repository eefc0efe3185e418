"""Weight files of rewards: found, downloaded, verified and loaded whole or not at all.

Some rewards are published as pickles. They are read with `weights_only=True`, after comparing their sha256
with the pinned or the given one; `scripts/convert_reward.py` turns them into safetensors once.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from am_diffusers.system.files import sha256, write_whole

logger = logging.getLogger(__name__)


def find_file(path: str | Path, revision: str | None, remedy: str) -> Path:
    """Find a local file, or download `owner/repository/file` from the hub.

    Raises:
        ValueError: if there is neither; ends with `remedy`.
    """
    place = Path(path)
    if place.is_file():
        return place
    try:
        if place.is_absolute() or len(place.parts) != 3:
            raise FileNotFoundError(path)
        owner, repository, file = place.parts
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"reward weights not found at {str(path)!r}: {remedy}") from error


def check_sha256(file: Path, expected: str | None) -> None:
    """Compare a file with a sha256; without one, log the sha256 of the file so that it can be pinned.

    Raises:
        ValueError: if they differ.
    """
    actual = sha256(file)
    if expected is None:
        logger.warning("%s isn't pinned: add `sha256: %s` to this reward's config", file.name, actual)
    elif actual != expected.lower():
        raise ValueError(
            f"sha256 of {file} is {actual}, expected {expected}: another or a damaged file; download it"
            " again, or give its own sha256 if you trust it"
        )


def refuse_sha256(name: str, sha256: str | None) -> None:
    """Raise ValueError if a reward that is loaded from a folder was given the sha256 of a file."""
    if sha256 is not None:
        raise ValueError(f"{name} is loaded from a folder, which has no sha256: set `revision` instead")


def read_weights(file: Path, sha256: str | None, remedy: str) -> Any:
    """Read a safetensors file or a published pickle, which may hold more than tensors.

    Raises:
        ValueError: if the file isn't the one expected or can't be read; ends with `remedy`.
    """
    try:
        if file.suffix == ".safetensors":
            if sha256 is not None:
                check_sha256(file, sha256)
            return load_file(file)
        check_sha256(file, sha256)
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # whose text recommends reading it without protection
        raise ValueError(f"{file} holds more than tensors, or is damaged: not read; {remedy}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged or isn't a weight file: {error}; {remedy}") from error


def state_dict_of(content: Any, file: Path, remedy: str) -> dict[str, Tensor]:
    """Return the content of a weight file once it is known to be tensors by name.

    Raises:
        ValueError: if it isn't; ends with `remedy`.
    """
    tensors = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file} isn't this reward's checkpoint: expected tensors by name in it; {remedy}")
    return dict(content)


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors by name as a safetensors file, in a folder that is made if it doesn't exist."""
    tensors = {key: value.contiguous() for key, value in weights.items()}
    write_whole(file, lambda part: save_file(tensors, part, {"format": "pt"}))


def check_keys(source: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError naming the first keys by which a checkpoint differs from its model."""
    differences = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    parts = [f"{len(keys)} {kind}, e.g. {', '.join(keys[:3])}" for kind, keys in differences.items() if keys]
    if parts:
        raise ValueError(f"the weights in {source} aren't this reward's: keys {'; '.join(parts)}")


def check_fit(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError naming the keys or shapes by which a checkpoint differs from a module."""
    own = module.state_dict()
    check_keys(source, own.keys() - weights.keys(), weights.keys() - own.keys())
    wrong = [f"{key} {tuple(weights[key].shape)}" for key in own if weights[key].shape != own[key].shape]
    if wrong:
        raise ValueError(f"the weights in {source} don't fit the model's shapes: {', '.join(wrong[:3])}")


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all weights into a module, after comparing keys and shapes.

    Raises:
        ValueError: naming the keys or shapes that differ; the module is unchanged then.
    """
    check_fit(module, weights, source)
    module.load_state_dict(weights, strict=True)
