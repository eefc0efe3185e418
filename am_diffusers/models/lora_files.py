"""LoRA files in the forms that trainers write, read strictly: what isn't understood is refused by name.

- Diffusers: `transformer.<layer>.lora_A.weight`; header entry `lora_adapter_metadata` for the strength.
- PEFT: a folder of `adapter_model.safetensors` and, for the strength, `adapter_config.json`.
- kohya's `.lora_down.weight`, `.lora_up.weight` and `.alpha`, of layers as Diffusers or ComfyUI name them.

A file's own keys are read: the loaders of Diffusers leave out keys that they don't know, and load the rest.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from am_diffusers.models.family import Family
from am_diffusers.models.lora_strength import DORA, PEFT_CONFIG, PEFT_PREFIX, read_config, scaling_of

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"(?P<name>.+?)\.(?:lora[._](?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))")
_PARTS = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": DORA,
    r"\.hada_w": "is a LoHa, no plain LoRA: merge it into the base with the program that trained it",
    r"\.lokr_w": "is a LoKr, no plain LoRA: merge it into the base with the program that trained it",
    r"^(text_encoder|lora_te)": "changes a text encoder too, which is not trained or read here: train and "
    "export it without",
}
_OTHER_CONTENTS = {
    b"<": "it is a web page: download the file itself (on the hub its address has /resolve/)",
    b"version https://git-lfs": "it only points to the file: run `git lfs pull`",
    b"PK": "it is a pickle: save it as safetensors with the program that made it",
}


@dataclass(frozen=True)
class LoraWeights:
    """The change `scaling * b @ a` of one linear layer's weight.

    Attributes:
        a: (rank, in), float32.
        b: (out, rank), float32.
        scaling: alpha / rank, or what the file says instead.
    """

    a: Tensor
    b: Tensor
    scaling: float


def find_lora(path: str | Path) -> Path:
    """Return the LoRA file that `path` names: itself, or the one in the folder.

    Raises:
        ValueError: if there is none, or it is no safetensors file.
    """
    path = Path(path)
    names = [LORA_FILE, PEFT_FILE] if path.is_dir() else [""]
    for file in (path / name for name in names):
        if file.is_file() and file.suffix == ".safetensors":
            return file
    inside = sorted(found.parent for name in names if name for found in path.glob(f"*/{name}"))
    found = f"; there is one in {inside[0]}" if inside else ""
    raise ValueError(
        f"no LoRA file {path / names[0]}: pass a .safetensors file, or a folder with {LORA_FILE} or "
        f"{PEFT_FILE}{found}"
    )


def sources_of(file: Path) -> list[Path]:
    """Return the files that a LoRA file is read from: itself, and PEFT's configuration beside it."""
    config = file.parent / PEFT_CONFIG
    return [file, config] if file.name == PEFT_FILE and config.is_file() else [file]


def read_lora(
    path: str | Path, family: Family, linear: Mapping[str, torch.nn.Linear]
) -> dict[str, LoraWeights]:
    """Read a LoRA file or folder; every key must fit.

    Args:
        path: see `find_lora`.
        family: the family of the base model.
        linear: linear layers of its network by name; they may be on the meta device.

    Returns:
        The change of each layer by name, on the CPU.

    Raises:
        ValueError: what is wrong with which file, in one line.
    """
    file = find_lora(path)
    state, header = _open(file)
    _check_kind(file, state)
    names = _layer_names(family, linear)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        layer = names.get(match["name"]) if match else None
        if match is None or layer is None:
            raise ValueError(f"{file}: no place for key {key!r} here{_expected(family, key)}")
        part = _PARTS[match["part"]]
        if part in parts.setdefault(layer, {}):
            raise ValueError(f"{file}: key {key!r} is there twice, in two forms: export it again")
        parts[layer][part] = value
    if not parts:
        raise ValueError(f"{file} holds no LoRA: it has no weights")
    config = read_config(file, state, header, family)
    return {name: _weights(file, name, part, linear[name], config) for name, part in parts.items()}


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
            return {key: opened.get_tensor(key) for key in keys}, opened.metadata() or {}
    except OSError as error:
        raise ValueError(f"cannot read the LoRA file {file}: {error}") from error
    except SafetensorError as error:
        with file.open("rb") as raw:
            start = raw.read(32).lstrip()
        reasons = [reason for begin, reason in _OTHER_CONTENTS.items() if start.startswith(begin)]
        reason = reasons[0] if reasons else f"{error}: it is cut off or damaged, copy or export it again"
        raise ValueError(f"cannot read the LoRA file {file}: {reason}") from error


def _check_kind(file: Path, keys: Iterable[str]) -> None:
    """Raise ValueError for keys of something else than a plain LoRA of the network."""
    for key in keys:
        for pattern, what in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise ValueError(f"{file} {what} (key {key!r})")


def _layer_names(family: Family, layers: Iterable[str]) -> dict[str, str]:
    """Return the layer that each name in a file stands for."""
    names: dict[str, str] = {}
    for layer in layers:
        names |= dict.fromkeys([f"{family.network}.{layer}", f"{PEFT_PREFIX}{layer}"], layer)
        other = family.comfyui(layer)
        names |= {} if other is None else {other: layer}
    return names


def _expected(family: Family, key: str) -> str:
    prefixes = (f"{family.network}.", PEFT_PREFIX)
    layer = next((key.removeprefix(p) for p in prefixes if key.startswith(p)), None)
    match = _KEY.fullmatch(key)
    if layer is not None and match is not None:
        name = match["name"].removeprefix(PEFT_PREFIX).removeprefix(prefixes[0])
        return f": this base model has no layer {name}, load it with the base model it was trained on"
    return (
        f", expected {prefixes[0]}<layer>.lora_A.weight as Diffusers writes it, {PEFT_PREFIX}<layer>... as "
        "PEFT does, or the names of scripts/export_lora.py --format comfyui: convert it"
    )


def _weights(
    file: Path,
    name: str,
    part: Mapping[str, Tensor],
    layer: torch.nn.Linear,
    config: Mapping[str, Any] | None,
) -> LoraWeights:
    """Return the change of one layer, whose tensors must fit it."""
    if not {"A", "B"} <= set(part):
        raise ValueError(f"{file}: {name} lacks lora_A or lora_B: export it again")
    a, b = part["A"].float(), part["B"].float()
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{file}: {name} has lora_A and lora_B of {shapes}, not of one rank")
    if (len(b), a.shape[1]) != (layer.out_features, layer.in_features):
        raise ValueError(
            f"{file}: {name} is {len(b)} x {a.shape[1]}, this base model has {layer.out_features} x "
            f"{layer.in_features}: load it with the base model it was trained on"
        )
    scaling = scaling_of(file, name, len(a), part.get("alpha"), config)
    if not (math.isfinite(scaling) and a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{file}: {name} is not finite: its training failed, or the file is damaged")
    return LoraWeights(a, b, scaling)
