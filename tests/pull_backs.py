"""Vector-Jacobian products and adjoint sweeps in one call, as tests want them."""

from am_diffusers.adjoint import last_step


def vjp(field, x, sigma, cond, cotangent):
    """Velocity and vector-Jacobian product of a field; the cotangent may be a function of the velocity."""
    velocity, pull = field.vjp(x, sigma, cond)
    return velocity, pull(cotangent(velocity) if callable(cotangent) else cotangent)


def swept(adjoint, base, trajectory, terminal, *policy, **options):
    """Sweep `lean_adjoint` or `full_adjoint` from the terminal cost's gradient at x_K."""
    last = last_step(base, trajectory)
    return adjoint(base, *policy, trajectory, last, terminal(last.final), **options)
