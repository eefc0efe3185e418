"""Which methods read which of the fields that aren't for all: a flag that would be ignored is refused."""

import dataclasses

from am_diffusers.config import BufferConfig, Config, DeterministicConfig, EfficientConfig
from am_diffusers.methods import METHODS

ADJOINT_MATCHING = ("adjoint_matching",)
BUFFERED = ("buffered_adjoint_matching",)
DETERMINISTIC = ("deterministic_adjoint_matching",)
EFFICIENT = ("efficient_adjoint_matching",)
STOCHASTIC = ADJOINT_MATCHING + BUFFERED
TERMINAL = STOCHASTIC + DETERMINISTIC + EFFICIENT


def field_names(section: type) -> list[str]:
    """Names of a section's fields."""
    return [field.name for field in dataclasses.fields(section)]


READ_BY: dict[str, tuple[str, ...]] = {
    "transitions": STOCHASTIC,
    "pairing": STOCHASTIC,
    "adjoint": STOCHASTIC,
    "num_inference_steps": STOCHASTIC + DETERMINISTIC,
    "loss_steps": STOCHASTIC,
    "step_selection": STOCHASTIC,
    "guidance_mode": STOCHASTIC,
    "mask_quantile": STOCHASTIC + DETERMINISTIC,
    "sigma_jitter": STOCHASTIC + DETERMINISTIC,
    **dict.fromkeys(field_names(BufferConfig), BUFFERED),
    **dict.fromkeys(field_names(DeterministicConfig), DETERMINISTIC),
    **dict.fromkeys(field_names(EfficientConfig), EFFICIENT),
    "divergence": TERMINAL,
    "divergence_q": TERMINAL,
    "divergence_samples": TERMINAL,
    "divergence_prompts": TERMINAL,
    "divergence_max_slope": TERMINAL,
    "reward_smoothing_std": TERMINAL,
    "reward_smoothing_samples": TERMINAL,
    "reward_clip_quantile": TERMINAL,
}
"""Names of fields of the sections and the methods that read them; those not named here: all methods."""


def check_belonging(config: Config) -> None:
    """Check that no field is set that the method doesn't read.

    Raises:
        ValueError: naming each such flag and the methods it belongs to.
    """
    method = config.method.method
    if method not in METHODS:
        return  # said with the nearest name by `make_plan`
    ignored = []
    for section in vars(config).values():
        for field in dataclasses.fields(section):
            readers = READ_BY.get(field.name)
            if readers and method not in readers and getattr(section, field.name) != _default(field):
                ignored.append(f"--{field.name} is for {', '.join(readers)}, not for {method}: leave it out")
    if ignored:
        raise ValueError("\n".join(ignored))


def _default(field: "dataclasses.Field[object]") -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
