"""Models in transformers' layout, in a folder or on the hub: loaded whole, or built without weights."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from am_diffusers.rewards.parts.files import check_keys

# Buffers (0, 1, 2, ...) that transformers < 4.31 saved with the weights; 5.4 still calls them unexpected.
OLD_BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
M = TypeVar("M", bound=PreTrainedModel)


def download_remedy(hub_id: str) -> str:
    """Return the end of an error about a model that isn't here: the command that downloads it."""
    return f"run `hf download {hub_id}` and give that name, or a folder that holds the files"


def check_model_type(expected: str, path: str, revision: str | None, user: str, remedy: str) -> None:
    """Raise ValueError unless there is the config.json of such a model; cheap, before gigabytes are read.

    Args:
        expected: `model_type` in the config.json, in any case.
        path: folder or hub id.
        revision: commit of a hub id.
        user: name of the reward that needs the model, for errors.
        remedy: end of the errors.
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
    """Load the model in a folder or on the hub, in float32, with all of its weights and no others.

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


def clip_sizes(vision: tuple[int, int, int], text: tuple[int, int, int], projection: int) -> dict[str, Any]:
    """Return arguments of `CLIPConfig` for patches of 14 pixels, from (width, layers, heads) a tower."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    towers = [dict(zip(names, t, strict=True)) | {"intermediate_size": 4 * t[0]} for t in (vision, text)]
    vision_config = towers[0] | {"patch_size": 14}
    return {"vision_config": vision_config, "text_config": towers[1], "projection_dim": projection}


VIT_L_14 = clip_sizes((1024, 24, 16), (768, 12, 12), 768)


def clip_skeleton(path: str, revision: str | None, released: Mapping[str, Mapping[str, Any]]) -> CLIPModel:
    """Return a CLIP model on the meta device, of the sizes in its config.json, else of `released` by hub id.

    Raises:
        ValueError: if there is no config.json and the model isn't a released one.
    """
    try:
        config = CLIPConfig.from_dict(CLIPConfig.get_config_dict(path, revision=revision)[0])
    except OSError as error:
        if path not in released:
            raise ValueError(f"config.json of {path!r} not found: {download_remedy(path)}") from error
        config = CLIPConfig(**released[path])
    with torch.device("meta"):
        return CLIPModel(config)
