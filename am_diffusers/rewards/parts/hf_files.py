"""Models in transformers' layout, in a folder or on the hub: checked and loaded whole or not at all."""

from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from am_diffusers.rewards.parts.files import check_keys

# Buffers (0, 1, 2, ...) that transformers < 4.31 saved with the weights; 5.4 still calls them unexpected.
OLD_BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
M = TypeVar("M", bound=PreTrainedModel)


def download_remedy(hub_id: str) -> str:
    """What to do when a model isn't there."""
    return f"run `hf download {hub_id}` and give that name, or a folder that holds the files"


def check_model_type(expected: str, path: str, revision: str | None, user: str, remedy: str) -> None:
    """Raise ValueError unless there is the config of a model; cheap, so known before gigabytes are read.

    Args:
        expected: `model_type` of its config.json, in any case.
        path: folder or hub id.
        revision: commit of a hub id.
        user: who wants the model, for errors.
        remedy: how errors end.
    """
    try:
        kind = PreTrainedConfig.get_config_dict(path, revision=revision)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"{user}'s config.json not found at {path!r}: {remedy}") from error
    if kind != expected.lower():
        raise ValueError(
            f"expected a {expected} model for {user}, got model_type {kind!r} in {path}: {remedy}"
        )


def load_pretrained(kind: type[M], path: str, revision: str | None, user: str, remedy: str) -> M:
    """The model in a folder or on the hub, in float32, all of its weights and no others.

    Raises:
        ValueError: if it is missing, damaged or another; errors name the user and end with `remedy`.
    """
    load: Any = kind.from_pretrained  # its annotations leave out the loading info
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, info = load(path, revision=revision, **options)
    except OSError as error:
        raise ValueError(f"{user}'s model.safetensors not found at {path!r}: {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"{user}'s weights in {path} are damaged ({error}): {remedy}") from error
    except RuntimeError as error:  # transformers' way of saying that shapes differ from the config
        raise ValueError(f"the weights in {path} don't fit its config.json: {error}") from error
    check_keys(path, info["missing_keys"], set(info["unexpected_keys"]) - OLD_BUFFERS)
    return model
