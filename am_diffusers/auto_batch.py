"""Micro-batches of size `auto`: the passes of an iteration are tried, halving their size until they fit.

What an iteration keeps in memory beside its largest passes is kept while they are tried: the states and
adjoints of the chunk under way, the rows collected before, and for the reward the base's own pass, inside
which it runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.noise import LatentSpec, generator_for
from am_diffusers.system.failures import REMAINING, PhaseMemoryError
from am_diffusers.terminal_cost import RewardOfLatents, reward_gradient
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True)
class Passes:
    """The largest passes of an iteration, on random latents.

    Attributes:
        base: field whose vector-Jacobian products the adjoint sweep takes.
        policy: field that is trained.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`.
        latents: shape and device of the latents.
        encode: prompts to their conditioning.
        prompts: any of the run; repeated as needed.
        parameters: trained parameters; their gradients are cleared after a pass.
        num_steps: denoising steps of a trajectory.
        num_rows: rows that an iteration collects on a process.
        offload: rows are kept on the CPU.
    """

    base: VelocityField
    policy: VelocityField
    reward: RewardOfLatents
    latents: LatentSpec
    encode: Callable[[Sequence[str]], Conditioning]
    prompts: Sequence[str]
    parameters: Sequence[torch.nn.Parameter]
    num_steps: int
    num_rows: int
    offload: bool = False

    @torch.no_grad()
    def sweep(self, size: int, reward_size: int | None) -> None:
        """The base's vjp on `size` samples and inside it the reward's gradient, `reward_size` at a time."""
        x, sigma, cond = self._point(size)
        # States, velocities, adjoints and base velocities of the chunk's steps, and the rows before it.
        kept = [x.new_empty(4 * self.num_steps, *x.shape), *self._rows()]
        self.base.vjp(
            x,
            sigma,
            cond,
            lambda v: reward_gradient(self.reward, x - sigma[0] * v, cond.prompts, batch_size=reward_size)[1],
        )
        del kept

    def loss(self, size: int) -> None:
        """Forward and backward of `size` rows of the matching loss."""
        x, sigma, cond = self._point(size)
        kept = self._rows()
        batch = MatchingBatch(x, sigma, x, torch.ones_like(sigma), torch.arange(size), cond)
        try:
            matching_loss(self.policy, batch).backward()
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        del kept

    def _point(self, size: int) -> tuple[Tensor, Tensor, Conditioning]:
        prompts = [self.prompts[i % len(self.prompts)] for i in range(size)]
        x = self.latents.draw([generator_for("probe", i) for i in range(size)])
        return x, x.new_full((size,), 0.5), self.encode(prompts)

    def _rows(self) -> list[Tensor]:
        """Memory of the rows of an iteration: states and targets."""
        spec, number = self.latents, 0 if self.offload else 2 * self.num_rows
        return [torch.empty(number, *spec.shape, device=spec.device, dtype=spec.dtype)]


def largest_fitting(
    setting: str, largest: int, run: Callable[[int], None], everywhere: Callable[[bool], bool]
) -> int:
    """Largest of `largest`, half of it, a quarter, ..., 1 with which `run` fits into memory.

    Args:
        setting: name of the size, for the error.
        largest: size to start with.
        run: does the work with a given size.
        everywhere: whether something is true on all processes; called once a try, so that all processes
            make the same tries and find the same size.

    Raises:
        ValueError: if even 1 doesn't fit.
    """
    size = largest
    while size:
        if everywhere(_fits(run, size)):
            return size
        size //= 2
    raise ValueError(f"--{setting} auto: not even 1 fits into memory: {REMAINING}")


def _fits(run: Callable[[int], None], size: int) -> bool:
    try:
        run(size)
        fits = True
    except (torch.OutOfMemoryError, PhaseMemoryError):
        fits = False
    # Only now is the exception gone, and with it the tensors of the frames it came through.
    clear_device_cache(garbage_collection=True)
    return fits
