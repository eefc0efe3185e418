"""Stage `judge`: a linear classifier that says what an image shows and whether it is spoilt.

It reads the features of EfficientNet-Lite0, a classifier of photographs, and was trained on real images of
the world only: no reward and no generated image had a part in it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluating.measuring.features import EfficientNet

from .loop import Loop, gather
from .world import COLOURS, CONCEPTS, CONDITIONS, Labels, World, draw_conditions

HEADS = {"concept": len(CONCEPTS), "background": len(COLOURS), "condition": len(CONDITIONS)}
SPOILT, HELD_OUT = 0.7, 2048


@dataclass(frozen=True)
class Judge:
    """Linear heads on standardised features.

    Attributes:
        mean: of the features, (D,).
        std: of the features, (D,).
        weights: a matrix (classes, D + 1) for each of `HEADS`, the last column the bias.
    """

    mean: Tensor
    std: Tensor
    weights: dict[str, Tensor]

    def logits(self, features: Tensor, head: str) -> Tensor:
        """Score the classes of one head, (B, classes)."""
        scaled = F.pad((features - self.mean) / self.std, (0, 1), value=1.0)
        return scaled @ self.weights[head].T

    def labels(self, features: Tensor) -> Labels:
        """Say what images with these features (B, D) show."""
        return Labels(*(self.logits(features, head).argmax(1) for head in HEADS))

    def save(self, file: Path) -> None:
        """Write the judge to a safetensors file."""
        tensors = {"mean": self.mean, "std": self.std} | self.weights
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    @classmethod
    def load(cls, file: Path) -> "Judge":
        """Read what `save` wrote."""
        tensors = load_file(file)
        return cls(tensors.pop("mean"), tensors.pop("std"), tensors)


def real_features(world: World, loop: Loop) -> tuple[Tensor, Labels]:
    """Draw `loop.steps` batches of real images, once: their features and labels."""
    network = EfficientNet.from_pretrained(device=loop.device)

    def look(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(20_000_000 + number)
        labels = world.draw(loop.batch, generator)
        labels = labels.replace(condition=draw_conditions(loop.batch, generator, SPOILT))
        features = network.image_features(world.images(labels, generator))
        return {"features": features} | labels.__dict__

    state = gather(loop.folder / "judge.pt", loop.steps, look)
    return state.pop("features"), Labels(**state)


def fit_judge(features: Tensor, labels: Labels, decay: float = 1e-4) -> Judge:
    """Fit the heads by cross-entropy with L2 decay, by L-BFGS."""
    judge = Judge(features.mean(0), features.std(0).clamp_min(1e-4), {})
    for head, classes in HEADS.items():
        judge.weights[head] = torch.zeros(classes, features.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([judge.weights[head]], max_iter=200, line_search_fn="strong_wolfe")

        def closure(head: str = head, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            target = getattr(labels, head)
            loss = F.cross_entropy(judge.logits(features, head), target)
            loss = loss + decay * judge.weights[head].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        judge.weights[head] = judge.weights[head].detach()
    return judge


def accuracy(judge: Judge, features: Tensor, labels: Labels) -> dict[str, float]:
    """Give the share of right answers of each head; of concept and background on clean images, too."""
    found, clean = judge.labels(features), labels.condition == 0
    right = {head: getattr(found, head) == getattr(labels, head) for head in HEADS}
    figures = {head: values.float().mean().item() for head, values in right.items()}
    figures |= {f"{head}, clean": values[clean].float().mean().item() for head, values in right.items()}
    each = {name: labels.condition == number for number, name in enumerate(CONDITIONS)}
    return figures | {name: right["condition"][rows].float().mean().item() for name, rows in each.items()}


def train_judge(world: World, loop: Loop) -> dict[str, float]:
    """Fit on all real images but the last `HELD_OUT`, write `judge.safetensors`, say how right it is."""
    features, labels = real_features(world, loop)
    rows = torch.arange(len(labels))
    judge = fit_judge(features[:-HELD_OUT], labels.index(rows[:-HELD_OUT]))
    judge.save(loop.folder / "judge.safetensors")
    return accuracy(judge, features[-HELD_OUT:], labels.index(rows[-HELD_OUT:]))
