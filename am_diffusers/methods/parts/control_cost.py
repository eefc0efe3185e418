"""The cost of a control without noise, |u|^q / q per unit of sigma (arXiv 2605.06583), and its best control.

u* = argmin over u of |u|^q / q + adjoint . u = -|adjoint|^{(2-q)/(q-1)} adjoint
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from am_diffusers.transitions import Transitions


def optimal_control(adjoint: Tensor, cost_power: float) -> Tensor:
    """The u that minimises |u|^q / q + adjoint . u, (B, ...): -|adjoint|^{(2-q)/(q-1)} adjoint.

    Args:
        adjoint: (B, ...); its norms are those of whole samples.
        cost_power: q > 1.
    """
    norm = adjoint.flatten(1).norm(dim=1).clamp(min=torch.finfo(adjoint.dtype).tiny)
    size = norm ** ((2 - cost_power) / (cost_power - 1))
    return -size.view(-1, *[1] * (adjoint.ndim - 1)) * adjoint


def step_length(table: Transitions, k: int) -> float:
    """Length of step `k` in sigma: the cost of a control there is this times |u|^q / q."""
    return -table.v_coef[k].item()


def control_cost(table: Transitions, controls: Mapping[int, Tensor], cost_power: float) -> Tensor:
    """What the controls of some steps cost together, (B,).

    Args:
        table: one without noise.
        controls: u_k by step k, (B, ...) each, at least one.
        cost_power: q > 1.
    """
    sizes = {k: control.flatten(1).norm(dim=1) for k, control in controls.items()}
    costs = [step_length(table, k) * size**cost_power / cost_power for k, size in sizes.items()]
    return torch.stack(costs).sum(0)
