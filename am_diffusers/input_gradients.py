"""Gradients of a cost of a sampler's end in all that it starts from: noise, embeddings, parameters.

A trajectory is recorded without gradients, then one vector-Jacobian product after the other walks back along
it: the memory of one network pass whatever the number of steps.

    exact        differentiates the sampler's own steps, as autograd through the sampler does:
                 a_k = x_coef[k] a_{k+1} + v_coef[k] J_x(x_k)^T a_{k+1},  z gains v_coef[k] J_z(x_k)^T a_{k+1}
    continuous   solves the adjoint equation of the sampler's ODE or SDE (`adjoint_tables.py`) on nodes of its
                 own, at most as many as there are steps: the gradient of the equation, not of the sampler

J_x and J_z are Jacobians in the state and in the other inputs. Both start from adjoint_K, the gradient of the
cost at the end. Rewards of a batch are summed, never averaged: each sample has the gradient of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.adjoint_tables import AdjointTable
from am_diffusers.rollout import states
from am_diffusers.system.failures import require_finite
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, DifferentiableField, InputGradients, VelocityField

LARGEST_GROWTH = 3.0
"""Step over step before above which order 2M falls back to order 1. The end of Stable Diffusion 3's own grid
grows 52-fold, where extrapolation would weigh two nearly equal products by 27 and -26."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """States of a sampler, from the noise to its end.

    Attributes:
        states: x_0 .. x_K, (K+1, B, ...).
        sigmas: noise levels of the states, (K+1,), decreasing.
        cond: conditioning of the B samples.

    Raises:
        ValueError: if their numbers differ.
    """

    states: Tensor
    sigmas: Tensor
    cond: Conditioning

    def __post_init__(self) -> None:
        if self.states.shape[:2] != (len(self.sigmas), len(self.cond)):
            raise ValueError(
                f"Recorded: {tuple(self.states.shape)} states for {len(self.sigmas)} sigmas and "
                f"{len(self.cond)} samples"
            )

    @property
    def final(self) -> Tensor:
        """The end x_K, (B, ...)."""
        return self.states[-1]

    def at(self, k: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return the arguments of a field at state `k`: x_k (B, ...), sigma (B,), cond."""
        x = self.states[k]
        return x, x.new_full((len(x),), self.sigmas[k].item()), self.cond

    def some(self, number: int) -> "Recorded":
        """Return `number` + 1 of the states, spread evenly over the steps, both ends among them.

        Raises:
            ValueError: if there are fewer steps.
        """
        steps = len(self.sigmas) - 1
        if not 1 <= number <= steps:
            raise ValueError(
                f"expected 1 to {steps} steps of the gradient, one for each of the sampler, got {number}"
            )
        kept = [round(i * steps / number) for i in range(number + 1)]
        return Recorded(self.states[kept], self.sigmas[kept], self.cond)


def record(
    field: VelocityField,
    transitions: Transitions,
    cond: Conditioning,
    noise: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Recorded:
    """Run all K steps of a field and keep every state; arguments are those of `rollout.sample`."""
    made = [noise, *states(field, transitions, cond, noise, step_noise)]
    return Recorded(torch.stack(made), transitions.sigmas, cond)


def exact_gradients(
    field: DifferentiableField,
    recorded: Recorded,
    transitions: Transitions,
    adjoint: Tensor,
    parameters: Sequence[Tensor] = (),
) -> InputGradients:
    """Differentiate the sampler that `recorded` comes from, the noise of its steps frozen: K passes.

    Args:
        field: field that took all K steps.
        recorded: what `record` returned.
        transitions: the table that was run.
        adjoint: adjoint_K, gradient of the cost at the end, (B, ...).
        parameters: leaves of the field to differentiate in as well.

    Returns:
        Gradients of the cost, `latents` in the starting noise.

    Raises:
        NonFiniteError: if a gradient is not finite; names step, sigma and prompts.
    """
    total: InputGradients | None = None
    for k in reversed(range(transitions.num_steps)):
        x_coef, v_coef = transitions.x_coef[k].item(), transitions.v_coef[k].item()
        _, product = field.input_vjp(*recorded.at(k), v_coef * adjoint, parameters)
        adjoint = x_coef * adjoint + product.latents
        total = product if total is None else _add(total, product)
        _require_finite(total._replace(latents=adjoint), recorded, k)
    assert total is not None
    return total._replace(latents=adjoint)


def continuous_gradients(
    field: DifferentiableField,
    recorded: Recorded,
    table: AdjointTable,
    adjoint: Tensor,
    order: int,
    parameters: Sequence[Tensor] = (),
) -> InputGradients:
    """Solve the adjoint equation at the recorded states: M passes, the first at the clean end.

    Args:
        field: field that was followed; what `table` says that the network predicts.
        recorded: states at the nodes of `table`, in the sampler's order.
        table: the equation, for the ODE or the SDE that was followed.
        adjoint: gradient of the cost at the end, (B, ...).
        order: 1, or 2 for 2M, which is of second order on smooth paths only, not along an SDE.
        parameters: leaves of the field to differentiate in as well.

    Returns:
        Gradients of the cost, `latents` in the state at the last node.

    Raises:
        ValueError: if the states aren't at the nodes of `table`, or for another order.
        NonFiniteError: if a gradient is not finite; names step, sigma and prompts.
    """
    if order not in (1, 2):
        raise ValueError(f"expected order 1 or 2, got {order}")
    if not torch.equal(recorded.sigmas.flip(0).double(), table.nodes):
        raise ValueError(
            f"states at {recorded.sigmas.flip(0).tolist()}, nodes at {table.nodes.tolist()}: make the table "
            "of the sigmas that were recorded, the other way round"
        )
    steps = table.clock.diff().abs()
    y, total, before = adjoint / table.scale[0].item(), None, None
    for i in range(table.num_steps):
        k = table.num_steps - i
        _, product = field.input_vjp(*recorded.at(k), y, parameters)
        product = product._replace(latents=table.gain[i].item() * product.latents)
        ahead = product
        if order == 2 and before is not None and steps[i] <= LARGEST_GROWTH * steps[i - 1]:
            weight = 0.5 * (steps[i] / steps[i - 1]).item()
            ahead = _add(_times(1 + weight, product), _times(-weight, before))
        before = product
        y = y + table.x_coef[i].item() * ahead.latents
        gained = _times(table.z_coef[i].item(), ahead)
        total = gained if total is None else _add(total, gained)
        _require_finite(total._replace(latents=y), recorded, k)
    assert total is not None
    return total._replace(latents=table.scale[-1].item() * y)


def _times(factor: float, gradients: InputGradients) -> InputGradients:
    def of(part: Tensor | None) -> Tensor | None:
        return None if part is None else factor * part

    latents, embeddings, pooled, parameters = gradients
    return InputGradients(factor * latents, of(embeddings), of(pooled), tuple(factor * p for p in parameters))


def _add(left: InputGradients, right: InputGradients) -> InputGradients:
    def of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else a + b

    return InputGradients(
        left.latents + right.latents,
        of(left.embeddings, right.embeddings),
        of(left.pooled, right.pooled),
        tuple(a + b for a, b in zip(left.parameters, right.parameters, strict=True)),
    )


def _require_finite(gradients: InputGradients, recorded: Recorded, k: int) -> None:
    place = f"step {k} (sigma {recorded.sigmas[k].item():.4f})"
    for name, values in gradients._asdict().items():
        if isinstance(values, Tensor):
            require_finite(f"gradient of {name} at {place}", values, recorded.cond.prompts)
