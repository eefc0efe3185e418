"""Backward passes through float16: powers of two that keep cotangents in its range.

float16 holds magnitudes from 6e-8 to 65504. A vector-Jacobian product is linear in its cotangent,

    J^T c = J^T (s c) / s,

and a power of two changes no digit, so the scaled pass is the plain one wherever that doesn't underflow or
overflow: bit for bit in float32 and bfloat16, where scaling is left on so that there is one code path.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAFE_NORM = 64.0
"""Norm that cotangents are given. Through the embedded SD3 in float16 (sigma .05 and .5), the vjp of a
cotangent of norm 2^-6 to 2^15 is off by .2 to .4 %, which is rounding; of norm 2^-12 by 4 to 6 %, and at 2^18
it overflows. This is the middle."""


def safe_scale(norms: Tensor) -> Tensor:
    """Powers of two s with SAFE_NORM <= s * norm < 2 * SAFE_NORM, of the shape of `norms`; 1 for norm 0."""
    _, exponents = torch.frexp(norms)
    # A number of Python's: a tensor of the host's would be copied to a card in every pass, which waits.
    _, wanted = math.frexp(SAFE_NORM)
    scales = torch.ldexp(torch.ones_like(norms), wanted - exponents)
    return torch.where((norms > 0) & norms.isfinite(), scales, 1.0)


def scaled_vjp(output: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    """`J^T cotangent` of `output` (B, ...) with respect to `x` (B, ...), each sample's cotangent scaled.

    Sample i of `output` depends on sample i of `x` alone, so each may have a scale of its own.
    """
    return scaled_vjps(output, [x], cotangent)[0]


def scaled_vjps(
    output: Tensor, rows: Sequence[Tensor], cotangent: Tensor, shared: Sequence[Tensor] = ()
) -> list[Tensor]:
    """`J^T cotangent` of `output` (B, ...) with respect to several inputs, in one pass; 0 for unused ones.

    Args:
        output: sample i of it depends on sample i of `rows`.
        rows: inputs of B rows each.
        cotangent: (B, ...); each sample's is scaled by itself, all alike if something is shared.
        shared: inputs that all samples depend on, such as parameters.
    """
    norms = torch.linalg.vector_norm(cotangent.flatten(1), dim=1, dtype=torch.float64)
    scales = safe_scale(norms.max().expand_as(norms) if shared else norms).to(cotangent)

    def like(tensor: Tensor) -> Tensor:
        return scales.view(-1, *[1] * (tensor.ndim - 1))

    gradients = torch.autograd.grad(
        output, [*rows, *shared], cotangent * like(cotangent), materialize_grads=True
    )
    of_rows, of_shared = gradients[: len(rows)], gradients[len(rows) :]
    return [g / like(g).to(g) for g in of_rows] + [g / scales[0].to(g) for g in of_shared]


class ScaledBackward:
    """Backward passes of an iteration, each scaled for its own loss; gradients add up as without scaling.

    The scale is the power of two that brings b = 2 sqrt(max_i w_i * |loss|) to SAFE_NORM. The sums in `.grad`
    follow from scale to scale, in float32: whatever the loss, no digit changes where nothing underflows or
    overflows. All of it is a function of the losses, so that there is no state to save.

    What b says depends on the loss. For a regression, sum_i w_i |d_i|^2, b bounds the norm of the gradient
    with respect to the d_i, so that what enters the network stays in range. Others have no such bound, b is
    only a size that grows with them: rewards that are summed may cancel, which makes b small and the scale
    large whatever their gradients are, and the terms of a policy gradient, of which none is negative, say
    nothing of the densities' gradients. Beyond float16's range such a gradient is infinite or NaN, which the
    trainer refuses, or loses digits unseen; float32 and bfloat16 have the range.

    Args:
        parameters: leaves whose `.grad` the passes fill.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._scale = 1.0

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        """Add the gradient of `loss` (), a sum of terms with factors `weight` (N,), >= 0."""
        bound = 2 * (weight.max() * loss.detach().abs()).double().sqrt()
        scale = safe_scale(bound).item()
        # A card takes `ldexp` by a general power, whose last digit nothing promises.
        assert math.frexp(scale)[0] == 0.5, f"the scale of a loss is no power of two: {scale!r}"
        self._rescale(scale)
        (loss * self._scale).backward()

    def finish(self) -> None:
        """Undo the scale of what is in `.grad`."""
        self._rescale(1.0)

    def _rescale(self, scale: float) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if gradients and scale != self._scale:
            torch._foreach_mul_(gradients, scale / self._scale)  # pyright: ignore[reportPrivateImportUsage]
        self._scale = scale
