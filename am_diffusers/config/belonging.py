"""Which methods read which of the fields that aren't for all: a flag that would be ignored is refused."""

import dataclasses
import json

from am_diffusers.config import BufferConfig, Config, DeterministicConfig, EfficientConfig
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.advantages import SMALL_GROUP

ADJOINT_MATCHING = ("adjoint_matching",)
BUFFERED = ("buffered_adjoint_matching",)
DETERMINISTIC = ("deterministic_adjoint_matching",)
EFFICIENT = ("efficient_adjoint_matching",)
STOCHASTIC = ADJOINT_MATCHING + BUFFERED
ADJOINTS = STOCHASTIC + DETERMINISTIC + EFFICIENT
"""Adjoint Matching and its relatives."""
END_POINTS = ("draft", "ram", "refl")
GRPO = ("flow_grpo",)


def field_names(section: type) -> list[str]:
    """Names of a section's fields."""
    return [field.name for field in dataclasses.fields(section)]


READ_BY: dict[str, tuple[str, ...]] = {
    "transitions": STOCHASTIC + GRPO,
    "pairing": STOCHASTIC,
    "adjoint": STOCHASTIC,
    "num_inference_steps": STOCHASTIC + DETERMINISTIC + END_POINTS + GRPO,
    "loss_steps": STOCHASTIC + GRPO,
    "step_selection": STOCHASTIC,
    "guidance_mode": STOCHASTIC,
    "mask_quantile": STOCHASTIC + DETERMINISTIC,
    "sigma_jitter": STOCHASTIC + DETERMINISTIC + GRPO,
    "offload_trajectories": ADJOINTS,
    **dict.fromkeys(field_names(BufferConfig), BUFFERED),
    **dict.fromkeys(field_names(DeterministicConfig), DETERMINISTIC),
    **dict.fromkeys(field_names(EfficientConfig), EFFICIENT),
    "rollout_sampler": END_POINTS,
    "advantages": ("ram", *GRPO),
    "ram_noises": ("ram",),
    "draft_steps": ("draft",),
    "refl_last_steps": ("refl",),
    "grpo_passes": GRPO,
    "grpo_clip_range": GRPO,
    "grpo_kl_weight": GRPO,
    "divergence": ADJOINTS,
    "divergence_q": ADJOINTS,
    "divergence_samples": ADJOINTS,
    "divergence_prompts": ADJOINTS,
    "divergence_max_slope": ADJOINTS,
    "reward_smoothing_std": ADJOINTS,
    "reward_smoothing_samples": ADJOINTS,
    "reward_clip_quantile": ADJOINTS,
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
                default = _default(field)
                text = default if isinstance(default, str) else json.dumps(default)
                ignored.append(
                    f"--{field.name} is for {', '.join(readers)}, not for {method}: leave it out (what a "
                    f"config file sets is undone by --{field.name} {text})"
                )
    if ignored:
        raise ValueError("\n".join(ignored))


def _default(field: "dataclasses.Field[object]") -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def cautions(config: Config) -> list[str]:
    """What a user should know of these settings before the run, a sentence each."""
    found, group = [], config.method.samples_per_prompt
    normalised = config.baselines.advantages == "normalised" and config.method.method in READ_BY["advantages"]
    if normalised and group < SMALL_GROUP:
        extreme = " (with 2 every advantage is +-reward_scale, whatever the rewards)" if group == 2 else ""
        found.append(
            f"--advantages normalised divides by the deviation of samples_per_prompt = {group} rewards, "
            f"which for so few is no tilt by reward / deviation{extreme}: set --samples_per_prompt "
            f"{SMALL_GROUP} or more, or --advantages centred"
        )
    return found
