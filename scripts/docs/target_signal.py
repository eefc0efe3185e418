"""Measure, step by step, how much of Adjoint Matching's targets is signal, and where the reward is decided.

`python scripts/docs/target_signal.py --config configs/tiny_sd3.yaml [--flag value ...]` takes the flags of
finetune.py. From states of each step of the base's chain it makes two continuations with noise of their own
and their lean adjoints, for SAMPLES samples of PROMPTS prompts, and prints by step

- energy: mean of weight / 2 * |target - base velocity|^2 for reward_scale 1, in nats, and its median;
- signal: the same of the conditional mean, from the product of the two continuations (unbiased); their ratio
  is what a single row tells;
- decided: share of the reward's variance within a prompt that the state of this step explains;
- decided here: what the step itself decides.

Errors are standard errors over samples. The tails are heavy: a signal may be carried by few samples, and a
small one with a large error is unknown rather than small.
"""

import sys
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import lean_adjoint
from am_diffusers.config.command_line import parse_config
from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.parts.continuations import ends_of
from am_diffusers.methods.parts.tails import steps_of
from am_diffusers.rollout import rollout
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import encoder, load_model, load_reward, weighted
from am_diffusers.run.plan import make_plan
from am_diffusers.run.surroundings import make_method
from am_diffusers.system.processes import Processes
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning

SAMPLES, PROMPTS, BATCH = 256, 8, 32
OWN = {"method": "adjoint_matching", "reward_scale": "1", "report_to": "none"}


class Continued(NamedTuple):
    """Rows (B, D) that follow from states of one step, in roots of nats, and rewards (B,)."""

    rows: Tensor
    rewards: Tensor


def continued(
    method: AdjointMatching, table: Transitions, x: Tensor, cond: Conditioning, noise: torch.Generator
) -> Continued:
    """Go on from states x (B, ...) of the first step of a table with new noise, and sweep back to it."""

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=noise)

    path = rollout(method.base, table, cond, x, lambda _: draw())
    ends = ends_of(method.base, path, method.shared.tail_samples, method.terminal, draw)
    last = table.num_steps - 1
    sweep = lean_adjoint(method.base, path, ends.adjoints.mean(0), last, first=0, with_left=False)
    target = matching.matching_target(
        table,
        0,
        velocity_base=sweep.velocity_base[0],
        adjoint_right=sweep.adjoints[1],
        adjoint_left=None,
        pairing="right",
    )
    weight = matching.matching_weight(table, 0)
    rows = (0.5 * weight) ** 0.5 * (target - sweep.velocity_base[0])
    return Continued(rows.flatten(1), ends.stats["reward"])


@torch.no_grad()
def measure(
    method: AdjointMatching, table: Transitions, cond: Conditioning, seed: int
) -> list[list[Continued]]:
    """Return two continuations of SAMPLES states of each step with noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, *method.latents.shape)
    found: list[list[list[Continued]]] = [[[], []] for _ in range(table.num_steps - 1)]
    for _ in range(SAMPLES // BATCH):
        start = torch.randn(shape, generator=generator)
        path = rollout(method.base, table, cond, start, lambda _: torch.randn(shape, generator=generator))
        for k, both in enumerate(found):
            rest = steps_of(table, k, table.num_steps)
            for each in both:
                each.append(continued(method, rest, path.latents[k], cond, generator))
    return [[Continued(*map(torch.cat, zip(*each, strict=True))) for each in both] for both in found]


def with_error(values: Tensor) -> str:
    """Return a mean and its standard error."""
    return f"{values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    flags = [word for name, value in OWN.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = parse_config([*sys.argv[1:], *flags, "--output_dir", folder])
            plan = make_plan(config, 1)
            accelerator = make_accelerator(config)
            model = load_model(plan, accelerator.device)
            rewards = [load_reward(each, config, accelerator.device) for each in config.method.rewards]
        except ValueError as error:
            sys.exit(f"error: {error}")
    method = make_method(plan, model, weighted(rewards, config), Processes(accelerator))
    assert isinstance(method, AdjointMatching)
    table = method.around.table(config.shared.transitions, config.shared.num_inference_steps)
    prompts = plan.train_prompts[:: len(plan.train_prompts) // PROMPTS][:PROMPTS] * (BATCH // PROMPTS)
    found = measure(method, table, encoder(config, model, 1.0)(prompts), config.run.seed)
    print(f"{SAMPLES} samples of {PROMPTS} prompts, {table.num_steps} steps, seed {config.run.seed}")
    print(f"{'sigma':<8}{'energy':<20}{'median':<10}{'signal':<20}{'decided':<10}decided here")
    decided = [share_decided(*both) for both in found] + [1.0]
    for k, (one, other) in enumerate(found):
        energy = torch.cat([one.rows, other.rows]).square().sum(1)
        signal = (one.rows * other.rows).sum(1)
        columns = with_error(energy), f"{energy.median():.3f}", with_error(signal), f"{decided[k]:.2f}"
        cells = [f"{column:<{width}}" for column, width in zip(columns, (20, 10, 20, 10), strict=True)]
        print(f"{table.sigmas[k]:<8.2f}{''.join(cells)}{decided[k + 1] - decided[k]:.2f}")


def share_decided(one: Continued, other: Continued) -> float:
    """Return the share of the variance within a prompt that both continuations of a state have in common."""
    first, second = (each.rewards.view(-1, PROMPTS) for each in (one, other))
    mean = (first.mean(0) + second.mean(0)) / 2
    variance = ((first - mean).square().mean() + (second - mean).square().mean()) / 2
    return float(((first - mean) * (second - mean)).mean() / variance)


if __name__ == "__main__":
    main()
