"""Surroundings of a method. A run fills it with a model; estimates, benchmarks and tests with stand-ins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from am_diffusers.adjoint import StateCost
from am_diffusers.divergences import Tilt
from am_diffusers.noise import LatentSpec
from am_diffusers.terminal_cost import RewardOfLatents, TerminalCost
from am_diffusers.transitions import TRANSITIONS, Transitions, jitter_sigmas
from am_diffusers.velocity import Conditioning, VelocityField

Gather = Callable[[Tensor], Tensor]
"""Concatenates a 1-D tensor over the ranks, in rank order; every rank passes the same length."""


def gather_from_one(values: Tensor) -> Tensor:
    """`Gather` of a single process: the tensor itself."""
    return values


def unconditional(prompts: Sequence[str]) -> Conditioning:
    """Return the conditioning of a field that sees no embeddings."""
    return Conditioning(tuple(prompts))


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples that a method handles at once; None = all.

    Attributes:
        batch: samples of an iteration over all ranks, for methods that keep some; None = this rank's.
        rollout: samples of a transformer call without gradient.
        reward: samples decoded and scored at once.
        offload: whether latents and targets wait on the CPU until the loss of their rows is taken.
    """

    batch: int | None = None
    rollout: int | None = None
    reward: int | None = None
    offload: bool = False


@dataclass(frozen=True, eq=False)
class Surroundings:
    """All that a method is given: whose velocities, which reward, which noise.

    Attributes:
        policy: field that is trained; where the method is `guided_everywhere`, with the rollout's guidance.
        base: the same field before fine-tuning.
        reward: `(latents (b, ...), prompts) -> (b,)`, higher is better; differentiable where the method
            `needs_reward_gradient`.
        latents: shape, device and dtype of a latent.
        sigmas: number of steps, and whether they add noise, to the grid of noise levels from 1 to 0.
        rollout: field that trajectories follow where that isn't the policy, for instance
            `GuidedField(policy, 3.0)`; None = the policy.
        encode: prompts to their conditioning, for methods that keep samples.
        gather: concatenates a 1-D tensor over ranks.
        sizes: micro-batches.
        tilt: law aimed at, if it isn't p_base * exp(reward_scale * reward).
        state_cost: running cost of the states along a trajectory, see adjoint.py; None = 0.
        iterations: iterations of the run that roll out, for what changes in its course.
        folder: folder for what a method keeps on the disk.
        terminal_cost: makes the terminal cost of a reward.
    """

    policy: VelocityField
    base: VelocityField
    reward: RewardOfLatents
    latents: LatentSpec
    sigmas: Callable[[int, bool], Tensor]
    rollout: VelocityField | None = None
    encode: Callable[[Sequence[str]], Conditioning] = unconditional
    gather: Gather = gather_from_one
    sizes: Sizes = Sizes()
    tilt: Tilt | None = None
    state_cost: StateCost | None = None
    iterations: int = 1
    folder: Path = Path()
    terminal_cost: Callable[..., TerminalCost] = TerminalCost

    def table(
        self, name: str, num_steps: int, *, jitter: float = 0.0, generator: torch.Generator | None = None
    ) -> Transitions:
        """Return the table of a rollout.

        Args:
            name: key of `TRANSITIONS`.
            num_steps: K.
            jitter: share of a step by which interior noise levels move at random, in [0, 0.5).
            generator: draws the jitter; the same on all ranks.
        """
        sigmas = self.sigmas(num_steps, name != "ode_euler")
        if jitter and generator is not None:
            sigmas = jitter_sigmas(sigmas, jitter, generator)
        return TRANSITIONS[name](sigmas)
