"""What a run of deterministic Adjoint Matching is told, see `config/`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeterministicConfig:
    """`method: deterministic_adjoint_matching`, which does NOT sample the tilted law.

    Attributes:
        truncate_steps: the last so many denoising steps are trained, at most num_inference_steps; null = all.
            This method does NOT sample base * exp(reward_scale * reward): it moves each picture of the base
            uphill against the square of the way.
        cost_power: exponent q > 1 of the cost |u|^q / q of a change u of the velocity, |u| that of a whole
            latent.
    """

    truncate_steps: int | None = None
    cost_power: float = 2.0
