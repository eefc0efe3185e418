"""A Brownian reference, its bridges, and the regressions on them (arXiv 2504.11713, 2506.22565).

Time is a noise level s, 1 at the source and 0 at the target; schedules are grids of it. A control w, a field
over (x, s), steers a Brownian motion of strength nu:

    step    x' = x + d w(x, s) + sqrt(d) xi,   d = nu^2 (s^2 - s'^2)        a table: x_coef 1, v_coef d
    bridge  X_s ~ N(s^2 source + (1 - s^2) end, nu^2 s^2 (1 - s^2) I) given both ends
    target  w = -a,   a = grad E(end) + h(end)                   `matching_target` of this table, base 0

exp(-E) is the law wanted at the end, and h, the corrector, is the mean of (source - end) / nu^2 given the
end: known where the source is a point, learned at the end points of the current control where it is a law
(2506.22565). Without it the end is the wanted law times what the reference makes of the source.

The adjoint is constant along a path: the reference has no drift. So any point of a bridge is a row of the
regression, and one end point serves many of them. A reference of the variance-preserving kind needs no
table of its own: between any two laws it has the coupling of the Brownian one with
nu^2 = (1 - kappa^2) / kappa, kappa its factor of the source at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.rollout import noise_level
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


def noise_levels(num_steps: int, lowest: float) -> Tensor:
    """Return the grid of K = `num_steps` steps: geometric from 1 to `lowest`, then 0, (K+1,) float64.

    Args:
        num_steps: at least 2.
        lowest: in (0, 1); nu * lowest is the noise of the last step, to be below the narrowest mode.

    Raises:
        ValueError: if a number is out of range.
    """
    if num_steps < 2 or not 0 < lowest < 1:
        raise ValueError(f"need at least 2 steps and a lowest level in (0, 1), got {num_steps} and {lowest}")
    levels = lowest ** torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return torch.cat([levels, levels.new_zeros(1)])


def brownian(levels: Tensor, nu: float) -> Transitions:
    """Return the steps of a controlled Brownian motion; without control the end is N(source, nu^2 I).

    The last step keeps its noise. The weight of step k in `matching_weight` is d_k.

    Args:
        levels: s, (K+1,), strictly decreasing from 1 to 0.
        nu: standard deviation of the whole motion, positive.

    Raises:
        ValueError: on any other grid or strength.
    """
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    decreasing = levels.ndim == 1 and len(levels) > 1 and bool((levels.diff() < 0).all())
    if not decreasing or levels[0] != 1 or levels[-1] != 0:
        raise ValueError(f"noise levels must decrease strictly from 1 to 0, got {levels.tolist()}")
    if not nu > 0:
        raise ValueError(f"the strength nu of the reference must be positive, got {nu}")
    variance = -(nu**2) * levels.square().diff()
    return Transitions(levels, torch.ones_like(variance), variance, variance.sqrt())


def bridge(source: Tensor, end: Tensor, levels: Tensor, nu: float, noise: Tensor) -> Tensor:
    """Draw the reference's state at levels s (B,) given both ends, (B, ...); `noise` is standard normal."""
    s = levels.to(end).reshape(-1, *[1] * (end.ndim - 1))
    return s**2 * source + (1 - s**2) * end + nu * s * (1 - s**2).clamp(min=0).sqrt() * noise


class Steered(NamedTuple):
    """Ends of controlled paths (B, ...), and log dP_reference / dP_control of each path, (B,)."""

    end: Tensor
    log_ratio: Tensor


@torch.no_grad()
def steer(
    control: VelocityField,
    table: Transitions,
    cond: Conditioning,
    source: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Steered:
    """Run a controlled Brownian motion from its source: K calls of the control.

    Args:
        control: w, a field over (x, s).
        table: steps of `brownian`.
        cond: conditioning, B rows.
        source: where paths start, (B, ...).
        step_noise: standard normal noise of step k, like `source`; called for k = 0 .. K-1 in this order.
    """
    x, log_ratio = source, source.new_zeros(len(source))
    for k in range(table.num_steps):
        w, noise = control(x, noise_level(table, k, x), cond), step_noise(k)
        shift = (table.v_coef[k] / table.std[k]).item() * w
        log_ratio = log_ratio - (shift * (0.5 * shift + noise)).flatten(1).sum(1)
        x = table.step(k, x, w, noise)
    return Steered(x, log_ratio)


def reciprocal_rows(
    source: Tensor,
    end: Tensor,
    adjoint: Tensor,
    levels: Tensor,
    nu: float,
    noise: Tensor,
    cond: Conditioning,
    *,
    weight: Tensor | None = None,
) -> MatchingBatch:
    """Rows of the control's regression, one a sample, on bridges between stored ends.

    Args:
        source: where paths started, (B, ...).
        end: where they ended, (B, ...).
        adjoint: a, the constant adjoint of each path, (B, ...).
        levels: s of each row, (B,), in [0, 1].
        nu: strength of the reference.
        noise: standard normal numbers for the bridges, (B, ...).
        cond: conditioning, B rows.
        weight: factors of the squared errors, (B,); 1 without. Those uniform in control energy are nu^2 s^2
            where s is log-uniform.
    """
    ones = end.new_ones(len(end))
    return MatchingBatch(
        latents=bridge(source, end, levels, nu, noise),
        sigmas=levels.to(end),
        target=-adjoint,
        weight=(ones if weight is None else weight) / len(end),
        samples=torch.arange(len(end)),
        cond=cond,
    )


def corrector_rows(source: Tensor, end: Tensor, nu: float, cond: Conditioning) -> MatchingBatch:
    """Rows of the corrector's regression, one a sample: h at the end points, level 0.

    Args:
        source: where paths of the current control started, (B, ...).
        end: where they ended, (B, ...).
        nu: strength of the reference.
        cond: conditioning, B rows.
    """
    ones = end.new_ones(len(end))
    return MatchingBatch(
        latents=end,
        sigmas=0 * ones,
        target=(source - end) / nu**2,
        weight=ones / len(end),
        samples=torch.arange(len(end)),
        cond=cond,
    )
