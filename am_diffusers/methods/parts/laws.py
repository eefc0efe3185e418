"""Sentences of the model card that say which law a run aims at, and claim no more (theory.md, section 9)."""

from am_diffusers.methods.parts.settings import SharedSettings

NO_LAW = "which raises the reward towards no law of its own"


def tilt(scale: float) -> str:
    """Name the base reweighted by the reward."""
    return f"`p_base(image) * exp({scale:g} * reward(image))`"


def of_the_tilt(shared: SharedSettings) -> str:
    """Say what a method aims at whose optimum is the tilt, and why these flags keep it from there."""
    reasons = guided(shared)
    if shared.reward_smoothing_std > 0:
        reasons.append("the reward is smoothed")
    if shared.reward_clip_quantile is not None:
        reasons.append("large reward gradients are clipped")
    if shared.ode_tail > 0:
        reasons.append(f"rollouts end in {shared.ode_tail} steps of the ODE (ode_tail), a bias")
    if reasons:
        return nowhere(shared, reasons)
    quantile = shared.mask_quantile
    masked = "" if quantile is None else f", less as the worst rows are left out (mask_quantile {quantile:g})"
    if shared.divergence == "kl":
        return f" towards {tilt(shared.scale)}{masked}"
    return f", divergence {shared.divergence} from the base, reward scale {shared.scale:g}{masked}"


def cautions_of_the_tilt(shared: SharedSettings) -> list[str]:
    """Say what flags make of a method whose optimum is the tilt that a user may not expect."""
    if shared.ode_tail == 0:
        return []
    return [
        f"ode_tail {shared.ode_tail} is biased: the optimum is not base * exp(reward_scale * reward), though "
        "with few steps the law may be nearer to it"
    ]


def to_first_order(
    shared: SharedSettings, advantages: str, *, kl_weight: float = 1.0, everywhere: bool = False
) -> str:
    """Say what a method aims at that compares rewards by value.

    Args:
        shared: flags of the run.
        advantages: how rewards of a prompt are compared.
        kl_weight: factor of the distance from the base.
        everywhere: whether guidance belongs to policy and base alike.
    """
    reasons = guided(shared, everywhere=everywhere)
    if advantages == "normalised":
        reasons.append("rewards are divided by their deviation within a prompt")
    if kl_weight == 0:
        reasons.append("nothing holds the policy to the base")
    if reasons:
        return nowhere(shared, reasons)
    return f" towards a law that is {tilt(shared.scale / kl_weight)} to first order in the exponent only"


def by_weights(shared: SharedSettings, sigma_min: float) -> str:
    """Say what a method aims at that weighs images of the base.

    Args:
        shared: flags of the run.
        sigma_min: noise level below which nothing is learned.
    """
    reasons = guided(shared, everywhere=True)
    if reasons:
        return nowhere(shared, reasons)
    early = f", as far as the reward is decided above noise level {sigma_min:g}" if sigma_min > 0 else ""
    return f" towards {tilt(shared.scale)}{early}"


def elsewhere(shared: SharedSettings, law: str) -> str:
    """Say that a method aims at another law."""
    return f" with reward scale {shared.scale:g}, {law}"


def nowhere(shared: SharedSettings, reasons: list[str]) -> str:
    """Say why no law is known that a run aims at."""
    return f" with reward scale {shared.scale:g}, towards no known law: {', '.join(reasons)}"


def guided(shared: SharedSettings, *, everywhere: bool = False) -> list[str]:
    """Return guidance as a reason, if it is on: a guided velocity is that of no family of noised laws."""
    scale = shared.rollout_guidance_scale
    where = "everywhere" if everywhere or shared.guidance_mode == "everywhere" else "in the rollout alone"
    return [] if scale == 1 else [f"guidance {scale:g} {where}"]
