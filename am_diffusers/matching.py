"""The regression that Adjoint Matching solves: rows (latents, sigma, target, weight) and their loss.

    target_k = velocity_base(x_k) - (std[k]^2 / v_coef[k]) * adjoint_{k+1}
    weight_k = (v_coef[k] / std[k])^2
    loss     = mean over kept rows of weight_k * |velocity_policy(x_k) - target_k|^2    (sum over latent dims)

(arXiv 2409.08861, section 5, for any transition table.) The target minimises
path_kl_k + adjoint_{k+1} . mean_k over the velocity: the regression finds the optimal control.

Pairing: `right` uses adjoint_{k+1}, as the optimum of the discrete chain does; `left`, as in the
published code, adjoint_k, with an error of the order of the step; `trapezoid` the mean of
(std^2 / |v_coef|) adjoint_{k+1} and eta(sigma) adjoint_k. At sigma = 1 all use adjoint_{k+1}.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers.parametrization import memoryless_eta
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField

Pairing = Literal["right", "left", "trapezoid"]
_TENSORS = ("latents", "sigmas", "target", "weight")


@dataclass(frozen=True, eq=False)
class MatchingBatch:
    """Rows of a weighted velocity regression; a sample usually has several rows, one per step.

    Attributes:
        latents: states x_k, (N, ...).
        sigmas: noise levels of the states, (N,).
        target: velocities to regress on, (N, ...).
        weight: factors of the squared errors, (N,); 0 for a masked row.
        samples: row of `cond` each row belongs to, (N,) int64 on the CPU.
        cond: conditioning of the samples, stored once.

    Raises:
        ValueError: if the shapes disagree.
    """

    latents: Tensor
    sigmas: Tensor
    target: Tensor
    weight: Tensor
    samples: Tensor
    cond: Conditioning

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("sigmas", "weight", "samples")}
        rows = (len(self.latents),)
        if self.target.shape != self.latents.shape or any(shape != rows for shape in shapes.values()):
            raise ValueError(
                f"MatchingBatch: latents {tuple(self.latents.shape)}, "
                f"target {tuple(self.target.shape)}, {shapes}"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def index(self, rows: Tensor) -> "MatchingBatch":
        """Rows `rows` (n,) int64 as a batch of their own."""
        picked = {name: (value := getattr(self, name))[rows.to(value.device)] for name in _TENSORS}
        return replace(self, samples=self.samples[rows.cpu()], **picked)

    def split(self, micro_batch_size: int) -> list["MatchingBatch"]:
        """Consecutive batches of at most `micro_batch_size` rows, which share this one's memory."""
        parts = {name: getattr(self, name).split(micro_batch_size) for name in (*_TENSORS, "samples")}
        return [
            replace(self, **dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)
        ]

    def to(self, device: torch.device | str) -> "MatchingBatch":
        """Return the same rows on `device`; the conditioning stays where it is."""
        moved = {n: (v := getattr(self, n)).to(device, non_blocking=v.is_pinned()) for n in _TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> "MatchingBatch":
        """Return the same rows, latents and targets in pinned memory, which a GPU copies from fastest."""
        return replace(self, latents=self.latents.pin_memory(), target=self.target.pin_memory())

    def describe(self) -> str:
        """Noise levels, prompts and norms of the rows, for an error message."""
        latents, target = (
            [round(n, 3) for n in rows.flatten(1).norm(dim=1).tolist()]
            for rows in (self.latents, self.target)
        )
        sigmas = [round(sigma, 4) for sigma in self.sigmas.tolist()]
        prompts = sorted({self.cond.prompts[i] for i in self.samples.tolist()})
        return (
            f"rows with sigmas {sigmas}, prompts {prompts}, norms of latents {latents} and targets {target}"
        )


def matching_target(
    transitions: Transitions,
    k: int,
    *,
    velocity_base: Tensor,
    adjoint_right: Tensor,
    adjoint_left: Tensor | None,
    pairing: Pairing = "right",
) -> Tensor:
    """Velocity the policy should have at x_k, (B, ...).

    Args:
        transitions: the table of the rollout.
        k: step with std > 0.
        velocity_base: base velocity at x_k, (B, ...).
        adjoint_right: adjoint_{k+1}, (B, ...).
        adjoint_left: adjoint_k, (B, ...); needed for `left` and `trapezoid` below sigma = 1.
        pairing: which adjoint belongs to step k, see the module docstring.

    Raises:
        ValueError: if `adjoint_left` is needed and missing, or `pairing` is unknown.
    """
    sigma = transitions.sigmas[k].item()
    ratio = transitions.std[k].item() ** 2 / transitions.v_coef[k].item()
    if pairing == "right" or sigma == 1:
        return velocity_base - ratio * adjoint_right
    if adjoint_left is None:
        raise ValueError(f"pairing '{pairing}' needs adjoint_left at sigma {sigma:.4f}")
    if pairing == "left":
        return velocity_base - ratio * adjoint_left
    if pairing == "trapezoid":
        return velocity_base + 0.5 * (memoryless_eta(sigma) * adjoint_left - ratio * adjoint_right)
    raise ValueError(f"pairing must be right, left or trapezoid, got '{pairing}'")


def matching_weight(transitions: Transitions, k: int) -> float:
    """(v_coef / std)^2 of step `k`.

    Raises:
        ValueError: if the step adds no noise: it carries no matching target.
    """
    std = transitions.std[k].item()
    if std == 0:
        raise ValueError(f"step {k} is deterministic (std = 0): it has no matching target")
    return (transitions.v_coef[k].item() / std) ** 2


def residual(velocity: Tensor, target: Tensor, weight: Tensor | float) -> Tensor:
    """Weighted squared error of each row, summed over the latent dimensions, (N,)."""
    return weight * (velocity - target).flatten(1).square().sum(1)


def matching_loss(policy: VelocityField, batch: MatchingBatch) -> Tensor:
    """Sum of the residuals of a batch's rows, differentiable in the policy's parameters, ()."""
    velocity = policy(batch.latents, batch.sigmas, batch.cond.index(batch.samples.tolist()))
    return residual(velocity, batch.target, batch.weight).sum()


class QuantileMask:
    """Masks rows whose sqrt(residual) exceeds a running quantile of their own step.

    Adjoints are heavy-tailed on multimodal data; the rows in the tail are left out of the loss and of
    its denominator, not scaled. Thresholds are kept per step, because residuals of early steps are
    larger by nature and a common threshold would mask mostly those.

    Args:
        quantile: share of rows kept, in (0, 1).
        decay: decay of the exponential moving average of the batch quantiles, in [0, 1); the first batch of a
            step initialises it.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, quantile: float = 0.9, decay: float = 0.9) -> None:
        if not (0 < quantile < 1 and 0 <= decay < 1):
            raise ValueError(f"need 0 < quantile < 1 and 0 <= decay < 1, got {quantile} and {decay}")
        self.quantile, self.decay = quantile, decay
        self._thresholds: dict[int, float] = {}

    def update(self, steps: Sequence[int], residuals: Tensor) -> None:
        """Moves the thresholds of `steps` (S,) by the residuals (samples of all ranks, S)."""
        quantiles = torch.quantile(residuals.double().sqrt(), self.quantile, dim=0)
        for step, new in zip(steps, quantiles.tolist(), strict=True):
            old = self._thresholds.setdefault(step, new)
            self._thresholds[step] = self.decay * old + (1 - self.decay) * new

    def keep(self, steps: Sequence[int], residuals: Tensor) -> Tensor:
        """Tell which residuals (B, S) are at most their step's threshold, (B, S) bool."""
        return residuals.double().sqrt() <= self.thresholds(steps, residuals)

    def thresholds(self, steps: Sequence[int], residuals: Tensor) -> Tensor:
        """Return the thresholds of `steps` on the device of `residuals`, (S,) float64."""
        return residuals.new_tensor([self._thresholds[step] for step in steps], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Threshold by step, JSON-serialisable."""
        return {str(step): value for step, value in self._thresholds.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._thresholds = {int(step): value for step, value in state.items()}
