"""What a method is called, and which law a run of it aims at: for the model card, which claims no more.

Adjoint Matching alone, with a buffer or without, has the tilt p_base * exp(reward_scale * reward) as its
optimum, and not with every setting; docs/theory.md, section 9, says what the others converge to.
"""

from typing import NamedTuple

from am_diffusers.config import Config
from am_diffusers.methods import METHODS


class Label(NamedTuple):
    """Name of a method and the arXiv number of its paper."""

    title: str
    paper: str


LABELS = {
    "adjoint_matching": Label("Adjoint Matching", "2409.08861"),
    "buffered_adjoint_matching": Label("Buffered Adjoint Matching", "2409.08861"),
    "deterministic_adjoint_matching": Label("Deterministic Adjoint Matching", "2605.06583"),
    "draft": Label("DRaFT", "2309.17400"),
    "efficient_adjoint_matching": Label("Efficient Adjoint Matching", "2605.11480"),
    "flow_grpo": Label("Flow-GRPO", "2505.05470"),
    "ram": Label("Reinforce Adjoint Matching", "2605.10759"),
    "refl": Label("ReFL", "2304.05977"),
}
NO_LAW = "which raises the reward towards no law of its own"
OTHER_LAWS = {
    "deterministic_adjoint_matching": (
        "which moves each picture of the base uphill, the reward against the cost of the way: not the base "
        "reweighted by the reward"
    ),
    "efficient_adjoint_matching": (
        "a reconstruction of the paper: its few-step ODE and its estimate of the base's score make it miss "
        "the base reweighted by the reward"
    ),
    "draft": NO_LAW,
    "refl": NO_LAW,
}


def aim(config: Config) -> str:
    """Size of a run and the law that it aims at, as a sentence."""
    optimizer, scale = config.optimizer, config.method.reward_scale
    size = f"{optimizer.max_train_steps} iterations of {optimizer.train_batch_size} pictures"
    method = config.method.method
    if method in OTHER_LAWS:
        return f"{size} with reward scale {scale:g}, {OTHER_LAWS[method]}."
    if not METHODS[method].aims_at_tilt:
        return f"{size} {_first_order(config)}."
    reasons = _departures(config)
    if reasons:
        return f"{size} with reward scale {scale:g}, towards no known law: {', '.join(reasons)}."
    quantile = config.method.mask_quantile
    masked = "" if quantile is None else f", less as the worst rows are left out (mask_quantile {quantile:g})"
    if config.terminal.divergence == "kl":
        return f"{size} towards {_tilt(scale)}{masked}."
    return f"{size}, divergence {config.terminal.divergence} from the base, reward scale {scale:g}{masked}."


def _tilt(scale: float) -> str:
    return f"`p_base(picture) * exp({scale:g} * reward(picture))`"


def _first_order(config: Config) -> str:
    """Of methods that compare values: RAM and Flow-GRPO."""
    grpo, scale = config.method.method == "flow_grpo", config.method.reward_scale
    kl_weight = config.baselines.grpo_kl_weight if grpo else 1.0
    reasons = _guided(config)
    if config.baselines.advantages == "normalised":
        reasons.append("rewards are divided by their deviation within a prompt")
    if kl_weight == 0:
        reasons.append("nothing holds the policy to the base")
    if reasons:
        return f"with reward scale {scale:g}, towards no known law: {', '.join(reasons)}"
    return f"towards a law that is {_tilt(scale / kl_weight)} to first order in the exponent only"


def _departures(config: Config) -> list[str]:
    """Why a run of Adjoint Matching doesn't have the tilt, nor that of another divergence, as its optimum."""
    reasons = _guided(config)
    if config.terminal.reward_smoothing_std > 0:
        reasons.append("the reward is smoothed")
    if config.terminal.reward_clip_quantile is not None:
        reasons.append("large reward gradients are clipped")
    return reasons


def _guided(config: Config) -> list[str]:
    """Guidance, as a reason: a guided velocity is that of no family of noised laws."""
    scale = config.method.rollout_guidance_scale
    everywhere = config.method.guidance_mode == "everywhere" or config.method.method == "flow_grpo"
    where = "everywhere" if everywhere else "in the rollout alone"
    return [] if scale == 1 else [f"guidance {scale:g} {where}"]
