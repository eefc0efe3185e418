"""The head that ImageReward and the LAION aesthetic predictor end in: five linear layers and nothing between.

Without activations they are one affine map `w . f + b`, composed in float64 and evaluated as one. The
published modules have dropouts between the layers, hence the numbers in the names of the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from am_diffusers.rewards.parts.files import check_keys

LAYERS = (0, 2, 4, 6, 7)
PUBLISHED_WIDTHS = (1024, 128, 64, 16)


@dataclass(frozen=True)
class AffineHead:
    """Affine function `w . f + b` of features f.

    Attributes:
        weight: w, (D,), float64.
        bias: b.
    """

    weight: Tensor
    bias: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return values (B,) of features (B, D), in float32 or better."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return features @ self.weight.to(features) + self.bias


def layered_head(width: int, widths: Sequence[int]) -> nn.Module:
    """Make the five layers of a head under their published names, to be loaded and collapsed.

    Args:
        width: length of the features.
        widths: widths of the four hidden layers.

    Raises:
        ValueError: if there aren't four hidden widths.
    """
    if len(widths) != len(LAYERS) - 1:
        raise ValueError(f"expected {len(LAYERS) - 1} widths of the head's hidden layers, got {list(widths)}")
    sizes = zip((width, *widths), (*widths, 1), strict=True)
    layers = {str(row): nn.Linear(*size) for row, size in zip(LAYERS, sizes, strict=True)}
    return nn.ModuleDict({"layers": nn.ModuleDict(layers)})


def collapse(weights: Mapping[str, Tensor], source: str, width: int) -> AffineHead:
    """Compose the five layers into one affine map.

    Args:
        weights: `layers.{0,2,4,6,7}.{weight,bias}` of any widths that compose.
        source: place of the weights, for errors.
        width: length of the features.

    Raises:
        ValueError: naming the keys that are missing or unexpected, or the layer whose shape doesn't compose.
    """
    expected = {f"layers.{row}.{kind}" for row in LAYERS for kind in ("weight", "bias")}
    check_keys(source, expected - weights.keys(), weights.keys() - expected)
    matrix = torch.eye(width, dtype=torch.float64)
    shift = torch.zeros(width, dtype=torch.float64)
    for row in LAYERS:
        weight, bias = (weights[f"layers.{row}.{kind}"].cpu().double() for kind in ("weight", "bias"))
        rows = 1 if row == LAYERS[-1] else bias.numel()
        if weight.shape != (rows, len(matrix)) or bias.shape != (rows,):
            raise ValueError(
                f"the head in {source} doesn't fit features of length {width}: layers.{row} is"
                f" {tuple(weight.shape)} with bias {tuple(bias.shape)}, expected ({rows}, {len(matrix)})"
            )
        matrix, shift = weight @ matrix, weight @ shift + bias
    return AffineHead(matrix[0], shift.item())
