"""One iteration of a run on data-free tensors: the real method, fields, VAE, rewards, loss and optimizer.

A transformer call is run once for each size of its input and counted again wherever the method makes the same
call, on top of what is held there; so is a pass of VAE and rewards. Everything between the calls runs as is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from am_diffusers.build.auto import SETTINGS
from am_diffusers.build.methods import METHOD_BUILDERS
from am_diffusers.build.training import make_state
from am_diffusers.estimate.pretend import Pretence
from am_diffusers.estimate.tracker import Tracker, Usage
from am_diffusers.load import encoder, guided, make_sampler, weighted
from am_diffusers.methods import Method
from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.base import Collected, gather_from_one
from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching
from am_diffusers.models.field import SD3Field
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes
from am_diffusers.rewards.skeleton import Skeleton
from am_diffusers.rollout import generator_for, generators_for
from am_diffusers.samples import pictures_of
from am_diffusers.scaling import ScaledBackward
from am_diffusers.terminal import Terminal, TerminalCost
from am_diffusers.train_state import TrainState
from am_diffusers.velocity import Conditioning, Cotangent

ROLLOUT, ADJOINT, REWARD = "rollout", "adjoint", "VAE and reward gradient"
LOSS, STEP, SAMPLING = "loss backward", "optimizer step", "grids and evaluation"
Costs = dict[tuple[object, ...], Usage]


@dataclass(frozen=True)
class Noise:
    """Latents without data, in the place of `LatentSpec`."""

    pretence: Pretence
    shape: tuple[int, ...]
    device: str = "cpu"

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """As many latents as generators."""
        return self.pretence.empty(len(generators), *self.shape)


class Field:
    """A transformer's velocity field, each kind of call run once and then only counted."""

    def __init__(self, field: SD3Field, tracker: Tracker, costs: Costs) -> None:
        self._field, self._tracker, self._costs = field, tracker, costs
        self._graph = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity; with gradient, as in the loss, it is the field's own."""
        if torch.is_grad_enabled():
            return self._field(x, sigma, cond)
        key = ("call", self._field.adapter, x.shape)
        if key not in self._costs:
            self._costs[key] = self._tracker.cost(lambda: self._field(x, sigma, cond))
        self._tracker.replay(self._costs[key])
        return torch.empty_like(x)

    def vjp(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, cotangent: Cotangent
    ) -> tuple[Tensor, Tensor]:
        """Velocity and vector-Jacobian product; a function as cotangent runs beside the graph between."""
        key, tracker = ("vjp", self._field.adapter, x.shape), self._tracker
        graph = ("graph", *key)
        with tracker.phase(ADJOINT):
            if key not in self._costs:
                self._costs[key] = tracker.cost(lambda: self._vjp(x, sigma, cond))
                self._costs[graph] = Usage(self._graph)
            tracker.replay(self._costs[key])
        velocity = torch.empty_like(x)
        if callable(cotangent):
            with tracker.holding(self._costs[graph].peak), tracker.phase(REWARD):
                cotangent(velocity)
        return velocity, torch.empty_like(x)

    def _vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        before = self._tracker.live

        def cotangent(velocity: Tensor) -> Tensor:
            self._graph = self._tracker.live - before
            return torch.zeros_like(velocity)

        self._field.vjp(x, sigma, cond, cotangent)


class TerminalPass:
    """A `TerminalCost` of which one pass of VAE and rewards is run and then only counted."""

    def __init__(self, terminal: TerminalCost, tracker: Tracker) -> None:
        self._terminal, self._tracker = terminal, tracker
        self._costs: Costs = {}

    def __call__(self, final: Tensor, prompts: Sequence[str], noise: Callable[[], Tensor]) -> Terminal:
        """Rewards and adjoints without data."""
        size = min(self._terminal.options.batch_size or len(final), len(final))
        if (size,) not in self._costs:
            part = final[:size]
            self._costs[size,] = self._tracker.cost(
                lambda: self._terminal(part, prompts[:size], lambda: torch.empty_like(part))
            )
        self._tracker.replay(self._costs[size,], len(final) / size)
        rewards, norms, slopes = (final.new_empty(len(final)) for _ in range(3))
        return Terminal(rewards, torch.empty_like(final), norms, slopes)

    def update(self, gradient_norms: Tensor) -> None:
        """Nothing: thresholds hold no memory."""


def run_iteration(
    plan: Plan, pretence: Pretence, tracker: Tracker, processes: Processes, *, samples: int
) -> TrainState:
    """An iteration of one process after its first, in the tracker's phases; the weights are held already.

    Args:
        plan: an `estimable` one.
        pretence: its model and rewards.
        tracker: is entered.
        processes: asked for nothing.
        samples: of the iteration on this process.

    Raises:
        ValueError: if the method has no estimate.
    """
    config, model = plan.config, pretence.model
    method = _method(plan, pretence, tracker, processes)
    state = make_state(config.optimizer, model.lora_parameters())
    with tracker.phase(STEP):
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        state.step()
    prompts = (plan.train_prompts * samples)[:samples]
    with tracker.phase(ROLLOUT):
        cond = encoder(config, model, config.method.rollout_guidance_scale)(prompts)
        generators = generators_for(config.run.seed, 0, range(samples))
        collected = method.collect(cond, generators, generator_for(config.run.seed, 0, "shared"))
    with tracker.phase(LOSS):
        _loss(method, collected, state, int(config.optimizer.loss_micro_batch_size), tracker)
    with tracker.phase(STEP):
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), config.optimizer.max_grad_norm)
        state.step()
    return state


def _loss(method: Method, collected: Collected, state: TrainState, size: int, tracker: Tracker) -> None:
    """The loss of all rows; gradients are there before the first micro-batch if there are several."""
    batches = collected.examples.split(size)
    if len(batches) == 1:
        state.optimizer.zero_grad()
    scaled = ScaledBackward(list(state.parameters.values()))

    def backward() -> None:
        with torch.enable_grad():
            scaled.backward(method.loss(batches[0])[0], batches[0].weight)

    tracker.replay(tracker.cost(backward), len(collected.examples) / len(batches[0]))
    scaled.finish()


def estimable(plan: Plan) -> Plan:
    """The plan with all that depends on data or on a device at a bound.

    No row is masked and no tilt estimated, `auto` is 1 (the least it tries), moments take 32 bits.
    """
    config, optimizer = plan.config, plan.config.optimizer
    found: dict[str, Any] = {name: 1 for name in SETTINGS if getattr(optimizer, name) == "auto"}
    if optimizer.optimizer == "adamw8bit":
        found["optimizer"] = "adamw"
    changed = replace(
        config,
        method=replace(config.method, mask_quantile=None),
        terminal=replace(config.terminal, divergence="kl", reward_clip_quantile=None),
        optimizer=replace(optimizer, **found),
    )
    return replace(plan, config=changed)


def sample_pictures(plan: Plan, pretence: Pretence, tracker: Tracker) -> int:
    """Sample and score one batch of grids or evaluation, after `run_iteration`; the number of pictures."""
    config, model = plan.config, pretence.model
    evaluation, prompts = config.evaluation, plan.eval_prompts or plan.validation_prompts
    a_prompt = evaluation.eval_images_per_prompt if plan.eval_prompts else evaluation.num_validation_images
    which = pictures_of(len(prompts), a_prompt)[: evaluation.eval_batch_size]
    sampler = make_sampler(config, model)
    sampler = replace(sampler, latents=Noise(pretence, sampler.latents.shape))  # pyright: ignore[reportArgumentType]
    with tracker.phase(SAMPLING), torch.no_grad():
        images = sampler.pictures(guided(model.policy, evaluation.eval_guidance_scale), prompts, which)
        texts = [prompts[picture.prompt] for picture in which]
        if plan.eval_prompts:  # base and tuned together
            for reward in [*pretence.rewards, *pretence.held_out]:
                if isinstance(reward, Skeleton):
                    reward(torch.cat([images, images]), [*texts, *texts])
    return len(which)


def _method(plan: Plan, pretence: Pretence, tracker: Tracker, processes: Processes) -> Method:
    """The method on the model's fields, each of whose calls is run once."""
    model, config, costs = pretence.model, plan.config, Costs()
    model.base = Field(model.base, tracker, costs)  # pyright: ignore[reportAttributeAccessIssue]
    model.policy = Field(model.policy, tracker, costs)  # pyright: ignore[reportAttributeAccessIssue]
    reward = weighted(pretence.rewards, config)
    method = METHOD_BUILDERS[config.method.method](plan, model, reward, processes)
    if isinstance(method, BufferedAdjointMatching):
        method = method.inner  # in an iteration that collects, which needs most
    if not isinstance(method, AdjointMatching):
        raise ValueError(f"no estimate for the method {config.method.method}")
    method.gather = gather_from_one
    method.terminal = TerminalPass(method.terminal, tracker)  # pyright: ignore[reportAttributeAccessIssue]
    method.latents = Noise(pretence, method.latents.shape)  # pyright: ignore[reportAttributeAccessIssue]
    return method
