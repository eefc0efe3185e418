"""Optimizers by name: AdamW, AdamW with 8-bit moments (bitsandbytes), Prodigy (prodigyopt, arXiv 2306.06101).

The last two are packages of their own, installed as the extras `8bit` and `prodigy`. Their states are
tensors, numbers, booleans and None, as checkpoints need them.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

EXTRAS = {"adamw8bit": ("bitsandbytes", "8bit"), "prodigy": ("prodigyopt", "prodigy")}
"""Package and extra of the optimizers that PyTorch doesn't have."""

OPTIMIZERS = ("adamw", *EXTRAS)
PRODIGY_SMALLEST_RATE = 0.1


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings that the optimizers have in common.

    Attributes:
        learning_rate: peak learning rate; of Prodigy a factor of the rate that it finds itself.
        betas: decays of the running means of the gradient and of its square.
        epsilon: added to the root of the latter.
        weight_decay: decoupled weight decay.
    """

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


def check_optimizer(name: str, learning_rate: float) -> None:
    """Check that the package of optimizer `name` is there, without importing it.

    Warns, as the Diffusers scripts do, of a learning rate that is AdamW's while Prodigy finds its own.

    Raises:
        ValueError: with the command that installs it.
    """
    package, extra = EXTRAS.get(name, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f'--optimizer {name} needs the package {package}: run `pip install "am_diffusers[{extra}]"` '
            f"(or `pip install {package}`), or use --optimizer adamw"
        )
    if name == "prodigy" and learning_rate < PRODIGY_SMALLEST_RATE:
        logger.warning(
            "--learning_rate %g is a factor of the rate that --optimizer prodigy finds itself, so training "
            "will hardly move: use --learning_rate 1",
            learning_rate,
        )


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Make optimizer `name`, one of OPTIMIZERS, over `parameters`.

    Prodigy has the options of the Diffusers scripts: bias correction, and a warm-up that doesn't count
    in its estimate.

    Raises:
        ValueError: if the name is unknown.
    """
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if name == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if name == "adamw8bit":
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **common)
    if name == "prodigy":
        return importlib.import_module("prodigyopt").Prodigy(
            parameters,
            use_bias_correction=True,
            safeguard_warmup=True,
            # No limit. Its own way to say so is infinity, which JSON doesn't have.
            growth_rate=sys.float_info.max,
            **common,
        )
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
