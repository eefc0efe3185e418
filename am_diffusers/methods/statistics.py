"""What an iteration reports of its samples: rewards, gradients, adjoint norms, path KL."""

import torch
from torch import Tensor

from am_diffusers.adjoint import AdjointSweep
from am_diffusers.methods.base import Gather
from am_diffusers.rollout import Trajectory
from am_diffusers.terminal_cost import Terminal

ADJOINT_NORM = "adjoint_norm/"


def statistics(terminal: Terminal, trajectory: Trajectory, sweep: AdjointSweep) -> dict[str, Tensor]:
    """Named statistics of B samples, (B,) each; `reward` and `reward_gradient_norm` come first.

    `path_kl` is that of steps 1 .. K-1, so that it means the same whether or not step 0 was selected;
    that of step 0 is `path_kl_first`, there if its base velocity is known.
    """
    table = trajectory.transitions
    path_kl = {
        k: table.path_kl(k, trajectory.velocities[k], sweep.velocity_base[k])
        for k in range(table.num_steps - 1)
        if k in sweep.velocity_base
    }
    first = {"path_kl_first": path_kl.pop(0)} if 0 in path_kl else {}
    return {
        "reward": terminal.rewards,
        "reward_gradient_norm": terminal.gradient_norms,
        "reward_slope": terminal.slopes,
        "path_kl": sum(path_kl.values(), torch.zeros_like(terminal.rewards)),
        **{f"{ADJOINT_NORM}{k:02d}": a.flatten(1).norm(dim=1) for k, a in sorted(sweep.adjoints.items())},
        **first,
    }


def end_point_statistics(terminal: Terminal, adjoint: Tensor, score: Tensor) -> dict[str, Tensor]:
    """Named statistics of B samples whose rows are noised from end points, (B,) each.

    Args:
        terminal: rewards and what was made of their gradients.
        adjoint: gradient of the terminal cost at the end points, (B, ...).
        score: the base's score there, (B, ...).
    """
    return {
        "reward": terminal.rewards,
        "reward_gradient_norm": terminal.gradient_norms,
        "reward_slope": terminal.slopes,
        "adjoint_norm": adjoint.flatten(1).norm(dim=1),
        "score_norm": score.flatten(1).norm(dim=1),
    }


def everywhere(stats: dict[str, Tensor], gather: Gather) -> dict[str, Tensor]:
    """Each statistic of the samples of all ranks, in one exchange."""
    values = gather(torch.stack(list(stats.values()), 1).flatten()).reshape(-1, len(stats))
    return dict(zip(stats, values.T, strict=True))


def means(columns: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each statistic, and the standard deviation of the rewards."""
    found = {name: column.mean().item() for name, column in columns.items()}
    return found | {"reward_std": columns["reward"].std(correction=0).item()}


def adjoint_norms(columns: dict[str, Tensor]) -> dict[int, float]:
    """The median norm of adjoint_k by k: single samples in the tail don't move it."""
    return {
        int(name.removeprefix(ADJOINT_NORM)): column.median().item()
        for name, column in columns.items()
        if name.startswith(ADJOINT_NORM)
    }
