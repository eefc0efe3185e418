"""What a run of Efficient Adjoint Matching is told, see `config/`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EfficientConfig:
    """`method: efficient_adjoint_matching`, a reconstruction of the paper.

    Attributes:
        eam_ode_steps: steps of second order of the policy's ODE to an end point; too few shrink the spread
            of what is learned.
        eam_rows: noise levels a sample is trained at, one in each of as many equal parts of (0, 1].
        eam_c: variance C of the Gaussian data behind the linear base, in squared latent units; .01 to .1 of
            the latents' variance is best. The reward acts through it: smaller is calmer and slower.
        eam_score: how the base's score is had: stopped (the ODE stops before its end, one step of the base
            leads on to the reward), or renoised (of end points, taken a little noisier).
        eam_sigma: noise level of that stop or score, in (0, 1); for renoised .05 to .1 is best.
        eam_max_weight: largest weight 2 (1 - sigma) / sigma of a row; Adjoint Matching's has no bound.
    """

    eam_ode_steps: int = 20
    eam_rows: int = 4
    eam_c: float = 0.05
    eam_score: Literal["stopped", "renoised"] = "stopped"
    eam_sigma: float = 0.3
    eam_max_weight: float = 20.0
