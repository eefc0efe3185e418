"""The strength of a LoRA file's layers: by their alphas, PEFT's configuration, or the header of the file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from am_diffusers.models.family import Family

PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
DORA = (
    "is a DoRA, which rescales whole weights and is no plain LoRA: merge it into the base with the program "
    "that trained it, or train with use_dora false"
)
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(
    file: Path, keys: Iterable[str], header: Mapping[str, str], family: Family
) -> dict[str, Any] | None:
    """Return what PEFT's configuration or the header says of the LoRA; None if nothing does."""
    prefix, beside = f"{family.network}.", file.parent / PEFT_CONFIG
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        if not beside.is_file():
            raise ValueError(f"{file}: {beside} is missing, which holds the strength of a PEFT LoRA: copy it")
        where, text, prefix = f"{beside}", beside.read_text("utf-8", "replace"), ""
    elif "lora_adapter_metadata" in header:
        where, text = f"{file}: lora_adapter_metadata", header["lora_adapter_metadata"]
    else:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): export the LoRA again") from error
    items = found.items() if isinstance(found, dict) else []
    config = {key.removeprefix(prefix): value for key, value in items if key.startswith(prefix)}
    _check_config(where, config)
    return config


def _check_config(where: str, config: Mapping[str, Any]) -> None:
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"{where} has no number {name}: export the LoRA again")
    if config.get("use_dora"):
        raise ValueError(f"{where} {DORA}")
    if config.get("peft_type", "LORA") not in (None, "LORA"):
        raise ValueError(f"{where} is a {config['peft_type']}, no plain LoRA: merge it into the base")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights {start} changes the base too; save it as a plain LoRA, PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def scaling_of(
    file: Path, name: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any] | None
) -> float:
    """Return the strength of one layer: by its alpha, or the configuration, or 1 where nothing says it."""
    by_alpha = None if alpha is None else alpha.float().mean().item() / rank
    if config is None:
        return 1.0 if by_alpha is None else by_alpha

    def own(patterns: str, default: str) -> float:
        known = config.get(patterns) or {}
        return known.get(get_pattern_key(list(known), name), config[default])

    if own("rank_pattern", "r") != rank:
        said = own("rank_pattern", "r")
        raise ValueError(f"{file}: its configuration says rank {said:g} for {name}, its weights have {rank}")
    scaling = own("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if by_alpha is not None and not math.isclose(by_alpha, scaling, rel_tol=1e-3):
        raise ValueError(
            f"{file} has two strengths for {name}, {by_alpha:g} by its alpha and {scaling:g} by its "
            "configuration: export it again"
        )
    return scaling
