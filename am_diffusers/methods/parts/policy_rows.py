"""Rows of a policy gradient: steps that were taken, how likely they were, and how well they turned out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning

_ROWS = ("latents", "next_latents", "velocity_base", "steps", "log_prob", "advantage", "weight")
_TABLE = ("sigmas", "x_coef", "v_coef", "std")


@dataclass(frozen=True, eq=False)
class PolicyRows:
    """Steps of rollouts, sample-major: the S rows of a sample are neighbours.

    Attributes:
        latents: states x_k, (N, ...).
        next_latents: states x_{k+1} that were reached, (N, ...).
        velocity_base: base velocities at x_k, (N, ...).
        steps: k, (N,) int64 on the CPU.
        log_prob: log density of x_{k+1} under the policy of the rollout, summed over the latent dimensions,
            (N,) float64.
        advantage: advantage of the sample, (N,).
        weight: factors in the loss, (N,).
        samples: row of `cond` each row belongs to, (N,) int64 on the CPU.
        cond: conditioning of the samples, stored once.
        table: table of the rollout.

    Raises:
        ValueError: if the shapes disagree.
    """

    latents: Tensor
    next_latents: Tensor
    velocity_base: Tensor
    steps: Tensor
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    samples: Tensor
    cond: Conditioning
    table: Transitions

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in (*_ROWS[3:], "samples")}
        states = {name: tuple(getattr(self, name).shape) for name in _ROWS[:3]}
        if len(set(states.values())) > 1 or set(shapes.values()) != {(len(self.latents),)}:
            raise ValueError(f"PolicyRows: expected N states and N numbers each, got {states | shapes}")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the states, (N,), in their dtype and on their device."""
        return self.table.sigmas[self.steps].to(self.latents)

    def split(self, micro_batch_size: int) -> list["PolicyRows"]:
        """Consecutive batches of at most `micro_batch_size` rows, which share this one's memory."""
        parts = [getattr(self, name).split(micro_batch_size) for name in (*_ROWS, "samples")]
        return [
            replace(self, **dict(zip((*_ROWS, "samples"), part, strict=True)))
            for part in zip(*parts, strict=True)
        ]

    def describe(self) -> str:
        """Steps, prompts and advantages of the rows, for an error message."""
        advantages = [round(a, 3) for a in self.advantage.tolist()]
        prompts = sorted({self.cond.prompts[i] for i in self.samples.tolist()})
        return f"steps {self.steps.tolist()}, prompts {prompts}, advantages {advantages}"

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as tensors and strings."""
        cond = {field.name: getattr(self.cond, field.name) for field in fields(self.cond)}
        return {
            "rows": {name: getattr(self, name) for name in (*_ROWS, "samples")},
            "cond": cond,
            "table": {name: getattr(self.table, name) for name in _TABLE},
        }


def rows_of_rank(
    states: Sequence[dict[str, Any]], share: PartShare, device: torch.device | str
) -> PolicyRows:
    """This rank's share of the rows that all ranks had, of which there may have been more or fewer.

    Args:
        states: `PolicyRows.state_dict` of the ranks `share.needed`, in this order.
        share: which of their samples are this rank's.
        device: where states go; the conditioning stays where it is.

    Raises:
        ValueError: if the samples can't be shared evenly.
    """
    numbers = [len(state["cond"]["prompts"]) for state in states]
    mine = range(sum(numbers))[share.rows(sum(numbers))]
    cond = {
        name: _cat([state["cond"][name] for state in states]) for name in states[0]["cond"]
    }  # prompts are a tuple, the others tensors or None
    offsets = [sum(numbers[:i]) for i in range(len(numbers))]
    samples = torch.cat([s["rows"]["samples"] + offset for s, offset in zip(states, offsets, strict=True)])
    own = (samples >= mine.start) & (samples < mine.stop)
    rows = {name: torch.cat([state["rows"][name] for state in states])[own] for name in _ROWS}
    moved = {name: value if name == "steps" else value.to(device) for name, value in rows.items()}
    return PolicyRows(
        **moved,
        samples=samples[own] - mine.start,
        cond=Conditioning(**cond).index(mine),
        table=Transitions(**{name: states[0]["table"][name] for name in _TABLE}),
    )


def _cat(parts: Sequence[Any]) -> Any:
    if parts[0] is None:
        return None
    return (
        torch.cat(list(parts)) if isinstance(parts[0], Tensor) else tuple(p for part in parts for p in part)
    )
