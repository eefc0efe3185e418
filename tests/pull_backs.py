"""Vector-Jacobian products and adjoint sweeps in one call, as tests want them."""

from typing import NamedTuple

from torch import Tensor

from am_diffusers.adjoint import last_step


def vjp(field, x, sigma, cond, cotangent):
    """Velocity and vector-Jacobian product of a field; the cotangent may be a function of the velocity."""
    velocity, pull = field.vjp(x, sigma, cond)
    return velocity, pull(cotangent(velocity) if callable(cotangent) else cotangent)


class Swept(NamedTuple):
    """A sweep over all steps: adjoint_1 .. adjoint_K, base velocities at 0 .. K-1, and x_K."""

    adjoints: dict[int, Tensor]
    velocity_base: dict[int, Tensor]
    final: Tensor


def swept(adjoint, base, trajectory, terminal, *policy, state_cost=None, **options):
    """Sweep `lean_adjoint` or `full_adjoint` from the terminal cost's gradient at x_K."""
    last, end = last_step(base, trajectory, state_cost), trajectory.transitions.num_steps - 1
    start = terminal(last.final)
    sweep = adjoint(base, *policy, trajectory, last.pull(start), end, state_cost=state_cost, **options)
    return Swept(sweep.adjoints | {end + 1: start}, sweep.velocity_base | {end: last.velocity}, last.final)
