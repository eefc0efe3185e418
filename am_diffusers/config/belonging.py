"""Which methods read which of the fields that aren't for all: a flag that would be ignored is refused."""

import dataclasses

from am_diffusers.config import Config
from am_diffusers.methods import METHODS

ADJOINT_MATCHING = ("adjoint_matching",)
TERMINAL = ADJOINT_MATCHING
END_POINTS = ("draft", "ram", "refl")
COMPARING = ("flow_grpo", "ram")
GRPO = ("flow_grpo",)

READ_BY: dict[str, tuple[str, ...]] = {
    "transitions": (*ADJOINT_MATCHING, *GRPO),
    "pairing": ADJOINT_MATCHING,
    "adjoint": ADJOINT_MATCHING,
    "loss_steps": (*ADJOINT_MATCHING, *GRPO),
    "mask_quantile": ADJOINT_MATCHING,
    "sigma_jitter": (*ADJOINT_MATCHING, *GRPO),
    "offload_trajectories": ADJOINT_MATCHING,
    "rollout_sampler": END_POINTS,
    "advantages": COMPARING,
    "ram_noises": ("ram",),
    "draft_steps": ("draft",),
    "refl_last_steps": ("refl",),
    "grpo_passes": GRPO,
    "grpo_clip_range": GRPO,
    "grpo_kl_weight": GRPO,
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
