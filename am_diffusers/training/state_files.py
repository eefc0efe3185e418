"""Nested state as two files that hold no code: tensors in safetensors, the rest in JSON.

`save_state(folder, name, state)` writes `name.json` and, if there are tensors, `name.safetensors`;
`load_state` gives back an equal state: dicts (with keys of any type that can be saved), lists, tuples,
tensors, strings, finite numbers, booleans and None. Floats survive exactly.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MARKS = ("$tensor", "$items", "$tuple")


def save_state(folder: Path, name: str, state: object) -> None:
    """Write `state` to `folder / name.json` and `folder / name.safetensors`.

    Raises:
        ValueError: if it holds something that neither JSON nor safetensors can; says where.
    """
    tensors: dict[str, Tensor] = {}
    document = _encode(state, name, tensors)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def load_state(folder: Path, name: str) -> Any:
    """Load what `save_state` wrote, tensors on the CPU.

    Raises:
        ValueError: if a file is missing or can't be read; names it.
    """
    file, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        document = json.loads(file.read_text("utf-8"))
        tensors = load_file(weights) if weights.exists() else {}
        return _decode(document, tensors)
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError) as error:
        raise ValueError(f"cannot read the state {file}: {error!r}") from error


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(tensor_bytes(each) for each in state.values())
    return sum(tensor_bytes(each) for each in state) if isinstance(state, list | tuple) else 0


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON form of `value`; its tensors go to `tensors` under their place."""
    if isinstance(value, Tensor):
        tensors[where] = _own_storage(value, tensors)
        return {"$tensor": where}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key not in MARKS for key in value):
            return {key: _encode(each, f"{where}.{key}", tensors) for key, each in value.items()}
        return {"$items": [[key, _encode(each, f"{where}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(each, f"{where}.{i}", tensors) for i, each in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError(f"state {where} is {value}: not finite, it would not survive a restart")
        return value
    raise ValueError(f"state {where} is a {type(value).__name__}: keep tensors, numbers and text in a state")


def _decode(document: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(document, list):
        return [_decode(each, tensors) for each in document]
    if not isinstance(document, dict):
        return document
    if "$tensor" in document:
        return tensors[document["$tensor"]]
    if "$items" in document:
        return {key: _decode(each, tensors) for key, each in document["$items"]}
    if "$tuple" in document:
        return tuple(_decode(each, tensors) for each in document["$tuple"])
    return {key: _decode(each, tensors) for key, each in document.items()}


def _own_storage(tensor: Tensor, others: dict[str, Tensor]) -> Tensor:
    """Return the tensor on the CPU, copied where it shares its storage: safetensors refuses that."""
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    used = {other.untyped_storage().data_ptr() for other in others.values()}
    return tensor if whole and tensor.untyped_storage().data_ptr() not in used else tensor.clone()
