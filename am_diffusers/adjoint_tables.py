"""Continuous adjoint equations as tables of numbers (AdjointDEIS, arXiv 2405.15020).

With the noise of the sampler frozen, the gradient a of a cost of the end of a trajectory obeys a linear
equation along it, whose linear part is integrated exactly (an exponential integrator, as in DEIS). In
y = a / scale every form marches from the clean end towards the noise by

    y_{i+1} = y_i + x_coef[i] * gain[i] J_x(x_i)^T y_i        z_{i+1} = z_i + z_coef[i] * J_z(x_i)^T y_i

for states x_i at increasing noise levels `nodes`, J the Jacobian of the network's output in the state or in
the conditioning and parameters z. That is order 1. Order 2M extrapolates both products linearly in `clock`
from the node before (Adams-Bashforth), see `input_gradients.continuous_gradients`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdjointTable:
    """Coefficients of the M steps of an adjoint equation, float64 on the CPU.

    Attributes:
        nodes: noise levels from the clean end to the noise, (M+1,), increasing.
        clock: the variable in which products are extrapolated, at the nodes, (M+1,), monotone.
        scale: factor between gradient and solution, a = scale * y, at the nodes, (M+1,).
        gain: factor of the state's Jacobian at the nodes that are evaluated, (M,).
        x_coef: factor of the state's product, (M,).
        z_coef: factor of the product with the other inputs, (M,).
    """

    nodes: Tensor
    clock: Tensor
    scale: Tensor
    gain: Tensor
    x_coef: Tensor
    z_coef: Tensor

    @property
    def num_steps(self) -> int:
        """Number M of steps."""
        return len(self.x_coef)


def velocity_form(nodes: Tensor) -> AdjointTable:
    """Return the adjoint equation of the ODE dx / dsigma = velocity, da / dsigma = -J^T a.

    Args:
        nodes: noise levels, (M+1,), increasing, in [0, 1].

    Raises:
        ValueError: on any other nodes.
    """
    nodes = _increasing(nodes)
    ones = torch.ones_like(nodes)
    return AdjointTable(nodes, nodes, ones, ones[1:], -nodes.diff(), -nodes.diff())


def memoryless_form(nodes: Tensor) -> AdjointTable:
    """Return the adjoint equation of the memoryless SDE, its noise frozen (ibid., theorem 2).

    a = (1 - sigma) y has no singularity at sigma = 1, where it vanishes: the start of a memoryless sampler
    doesn't move its end.

    Args:
        nodes: noise levels, (M+1,), increasing, the first below 1.

    Raises:
        ValueError: on any other nodes.
    """
    nodes = _increasing(nodes)
    t = 1 - nodes
    return AdjointTable(nodes, nodes, t, torch.ones_like(t[1:]), -2 * nodes.diff(), t.square().diff())


def noise_form(alpha: Tensor, sigma: Tensor, *, stochastic: bool = False) -> AdjointTable:
    """Return the adjoint equation of a variance-preserving model that predicts the noise of x.

    x = alpha * clean + sigma * noise with alpha^2 + sigma^2 = 1. In rho = sigma / alpha the ODE is
    d(x / alpha) / d rho = noise, so that y = alpha a has dy / d rho = -alpha J^T y. Flow models don't
    use it: their alpha goes to 0 and rho to infinity, where a step from the node before is worthless.

    Args:
        alpha: factors of the clean part at the nodes, (M+1,), decreasing, above 0.
        sigma: noise levels, (M+1,), increasing, above 0.
        stochastic: the reverse SDE of the forward process instead of the ODE, its noise frozen.

    Raises:
        ValueError: on any other nodes.
    """
    nodes, alpha = _increasing(sigma), alpha.to(torch.float64)
    if not (alpha > 0).all() or nodes[0] <= 0:
        raise ValueError(
            f"the noise form needs alpha and sigma above 0, got {alpha.tolist()} and {nodes.tolist()}"
        )
    rho = nodes / alpha
    steps = -(2 if stochastic else 1) * rho.diff()
    return AdjointTable(nodes, -rho.log(), 1 / alpha, alpha[:-1], steps, steps)


def _increasing(nodes: Tensor) -> Tensor:
    nodes = torch.as_tensor(nodes, dtype=torch.float64, device="cpu")
    if nodes.ndim != 1 or len(nodes) < 2 or not (nodes.diff() > 0).all() or nodes[0] < 0 or nodes[-1] > 1:
        raise ValueError(f"nodes must increase strictly within 0 and 1, at least two, got {nodes.tolist()}")
    return nodes
