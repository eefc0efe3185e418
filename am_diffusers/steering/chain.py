"""A frozen sampler with a reward at its end, as a function of what it starts from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from am_diffusers.adjoint import terminal_adjoint
from am_diffusers.adjoint_tables import memoryless_form, velocity_form
from am_diffusers.input_gradients import continuous_gradients, exact_gradients, record
from am_diffusers.rollout import sample
from am_diffusers.system.failures import require_finite
from am_diffusers.terminal_cost import RewardOfLatents, reward_gradient
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, DifferentiableField, InputGradients

Gradient = Literal["exact", "deis1", "deis2"]
GRADIENTS: tuple[str, ...] = get_args(Gradient)


class End(NamedTuple):
    """End of a sampler.

    Attributes:
        final: final latents, (B, ...).
        rewards: (B,).
        gradients: gradients of the *cost* -reward in the sampler's start; None if they weren't asked for.
    """

    final: Tensor
    rewards: Tensor
    gradients: InputGradients | None = None


@dataclass
class Chain:
    """A sampler and the reward of its end; the noise of stochastic steps is frozen.

    Attributes:
        network: field that is followed.
        transitions: table of its steps.
        reward: differentiable `(latents (B, ...), prompts) -> (B,)`.
        gradient: `exact` differentiates the sampler's steps, `deis1` and `deis2` solve the adjoint equation.
        gradient_steps: steps of the adjoint equation, at most the sampler's; None = as many.
        step_noise: noise of step k, the same at every call; None for deterministic tables.
        branches: network passes of one velocity: 2 with guidance.
        passes: network passes of one sample so far; a forward and a backward pass count one each.
    """

    network: DifferentiableField
    transitions: Transitions
    reward: RewardOfLatents
    gradient: Gradient = "exact"
    gradient_steps: int | None = None
    step_noise: Callable[[int], Tensor] | None = None
    branches: int = 1
    passes: int = field(default=0, compare=False)

    @torch.no_grad()
    def end(self, cond: Conditioning, noise: Tensor) -> End:
        """Sample and score.

        Raises:
            NonFiniteError: if a reward is not finite; names the prompts.
        """
        final = sample(self.network, self.transitions, cond, noise, self.step_noise)
        self.passes += self.branches * self.transitions.num_steps
        rewards = self.reward(final, cond.prompts).to(final)
        require_finite("reward", rewards, cond.prompts)
        return End(final, rewards)

    def differentiated(self, cond: Conditioning, noise: Tensor) -> End:
        """Sample, score and differentiate.

        Raises:
            NonFiniteError: if a reward or a gradient is not finite; names step and prompts.
        """
        recorded = record(self.network, self.transitions, cond, noise, self.step_noise)
        rewards, gradient = reward_gradient(self.reward, recorded.final, cond.prompts)
        adjoint = terminal_adjoint(gradient, 1.0)
        steps = self.gradient_steps or self.transitions.num_steps
        self.passes += self.branches * (self.transitions.num_steps + 2 * steps)
        if self.gradient == "exact":
            gradients = exact_gradients(self.network, recorded, self.transitions, adjoint)
        else:
            some = recorded.some(steps)
            form = memoryless_form if self.transitions.std.any() else velocity_form
            order = 1 if self.gradient == "deis1" else 2
            nodes = some.sigmas.flip(0)
            gradients = continuous_gradients(self.network, some, form(nodes), adjoint, order)
        return End(recorded.final, rewards, gradients)
