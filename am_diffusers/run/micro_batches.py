"""Micro-batches of size `auto`: the passes of an iteration are tried, halving their size until they fit.

What an iteration keeps in memory beside its largest passes is kept while they are tried: the states and
adjoints of the chunk under way, the rows collected before, and for the reward the base's own pass, inside
which it runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from am_diffusers.config import OptimizerConfig
from am_diffusers.config.optimizer import MicroBatch
from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.models.base import Model
from am_diffusers.noise import LatentSpec, generator_for
from am_diffusers.rewards import Reward
from am_diffusers.run.counting import count
from am_diffusers.run.fields import with_guidance
from am_diffusers.run.load import encoder, latent_spec, weighted
from am_diffusers.run.plan import Plan
from am_diffusers.system.failures import REMAINING, is_out_of_memory
from am_diffusers.system.processes import Processes
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
        encode: function from prompts to their conditioning.
        prompts: any prompts of the run; repeated as needed.
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
        """Take the base's vjp on `size` samples, and before pulling the reward's gradient."""
        x, sigma, cond = self._point(size)
        # States, velocities, adjoints and base velocities of the chunk's steps, and the rows before it.
        kept = [x.new_empty(4 * self.num_steps, *x.shape), *self._rows()]
        velocity, pull = self.base.vjp(x, sigma, cond)
        clean = x - sigma[0] * velocity
        pull(reward_gradient(self.reward, clean, cond.prompts, batch_size=reward_size)[1])
        del kept

    def loss(self, size: int) -> None:
        """Run forward and backward of `size` rows of the matching loss."""
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
        """Make tensors of the size of an iteration's rows: states and targets."""
        spec, number = self.latents, 0 if self.offload else 2 * self.num_rows
        return [torch.empty(number, *spec.shape, device=spec.device, dtype=spec.dtype)]


def largest_fitting(
    setting: str, largest: int, run: Callable[[int], None], everywhere: Callable[[bool], bool]
) -> int:
    """Return the largest of `largest`, half of it, a quarter, ..., 1 with which `run` fits into memory.

    Args:
        setting: name of the size, for the error.
        largest: size to start with.
        run: function that does the work with a given size.
        everywhere: tells if something is true on all processes; called once per try, so that all processes
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
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Only now is the exception gone, and with it the tensors of the frames it came through.
    clear_device_cache(garbage_collection=True)
    return fits


HEADROOM = 0.08
"""Share of a card's memory that no try may take: the memory of later iterations is in more pieces."""


@contextmanager
def headroom(device: torch.device) -> Iterator[None]:
    """Try sizes with less than what is free on a card; nothing changes on a CPU."""
    if device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    own = torch.cuda.memory_reserved(device)
    fraction = min(before, (free + own) / total) * (1 - HEADROOM)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


SETTINGS = ("rollout_micro_batch_size", "reward_micro_batch_size", "loss_micro_batch_size")


def find_micro_batches(plan: Plan, model: Model, rewards: Sequence[Reward], processes: Processes) -> Plan:
    """Return the plan with the largest sizes that fit in place of `auto`, and print them.

    Raises:
        ValueError: if even a size of 1 doesn't fit.
    """
    options = plan.config.optimizer
    wanted = [name for name in SETTINGS if getattr(options, name) == "auto"]
    if not wanted:
        return plan

    def everywhere(fits: bool) -> bool:
        return processes.sum_numbers({"fits": fits})["fits"] == processes.number

    passes, share = make_passes(plan, model, rewards), options.train_batch_size // plan.num_processes
    with processes.together(), headroom(model.device):
        sizes = _search(passes, options, share, everywhere)
    found = {name: sizes[name] for name in wanted}
    processes.accelerator.print("\n".join(f"{name}: auto found {size}" for name, size in found.items()))
    return replace(plan, config=replace(plan.config, optimizer=replace(options, **found)))


def _search(
    passes: Passes, options: OptimizerConfig, share: int, everywhere: Callable[[bool], bool]
) -> dict[str, int]:
    """Return each setting's size: as given if it isn't `auto`, or all there is."""

    def size_of(name: str, largest: int, run: Callable[[int], None]) -> int:
        given: MicroBatch | None = getattr(options, name)
        if given == "auto":
            return largest_fitting(name, largest, run, everywhere)
        return min(given or largest, largest)

    # While the reward's size is open, one image at a time: the transformer takes most of the time.
    images = 1 if options.reward_micro_batch_size == "auto" else options.reward_micro_batch_size
    rollout = size_of(SETTINGS[0], share, lambda size: passes.sweep(size, images))
    reward = size_of(SETTINGS[1], rollout, lambda size: passes.sweep(rollout, size))
    loss = size_of(SETTINGS[2], passes.num_rows, passes.loss)
    return dict(zip(SETTINGS, (rollout, reward, loss), strict=True))


def make_passes(plan: Plan, model: Model, rewards: Sequence[Reward]) -> Passes:
    """Return the passes of this run."""
    config, options = plan.config, plan.config.shared
    reward, fields = weighted(rewards, config), with_guidance(config, model.policy, model.base)
    return Passes(
        fields.base,
        fields.policy,
        lambda latents, prompts: reward(model.decode(latents), prompts),
        latent_spec(config, model),
        encoder(config, model, options.rollout_guidance_scale),
        plan.used_train_prompts(),
        list(model.lora_parameters().values()),
        num_steps=options.num_inference_steps,
        num_rows=config.optimizer.train_batch_size // plan.num_processes * count(config).rows,
        offload=config.optimizer.offload_trajectories,
    )
