"""Stage `judge`: linear classifiers that say what an image shows and whether it is spoilt.

See `am_diffusers/rewards/world.py`. They are trained on real images of the world only: no reward and no
generated image has a part in it.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier, official_pixels
from am_diffusers.rewards.world import Heads, judge_features

from .loop import Loop, gather
from .world import COLOUR_NAMES, CONCEPTS, CONDITIONS, Labels, World, draw_conditions

NAMES = {
    "concept": [concept.name for concept in CONCEPTS],
    "background": list(COLOUR_NAMES),
    "condition": list(CONDITIONS),
}
SPOILT, HELD_OUT = 0.7, 2048


@torch.no_grad()
def real_features(world: World, loop: Loop) -> tuple[Tensor, Labels]:
    """Draw `loop.steps` batches of real images, once: their features and labels."""
    network = load_classifier(ImageNetClass.released).eval().to(loop.device)

    def look(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(20_000_000 + number)
        labels = world.draw(loop.batch, generator)
        labels = labels.replace(condition=draw_conditions(loop.batch, generator, SPOILT))
        pixels = official_pixels(world.images(labels, generator)).to(loop.device)
        return {"features": judge_features(network, pixels).cpu()} | labels.__dict__

    state = gather(loop.folder / "judge.pt", loop.steps, look)
    return state.pop("features"), Labels(**state)


def fit_judge(features: Tensor, labels: Labels, decay: float = 1e-4) -> Heads:
    """Fit the classifiers by cross-entropy with L2 decay, by L-BFGS; of backgrounds on clean images only."""
    heads = Heads(features.mean(0), features.std(0).clamp_min(1e-4), {}, NAMES)
    for head, names in NAMES.items():
        rows = labels.condition == 0 if head == "background" else slice(None)
        own, target = features[rows], getattr(labels, head)[rows]
        weights = torch.zeros(len(names), features.shape[1] + 1, requires_grad=True)
        heads.weights[head] = weights
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure(
            head: str = head,
            weights: Tensor = weights,
            optimizer: torch.optim.LBFGS = optimizer,
            own: Tensor = own,
            target: Tensor = target,
        ) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(heads.logits(own, head), target) + decay * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        heads.weights[head] = weights.detach()
    return heads


def accuracy(heads: Heads, features: Tensor, labels: Labels) -> dict[str, float]:
    """Return the share of right answers of each classifier, of some on clean images alone, too."""
    clean = labels.condition == 0
    right = {head: heads.logits(features, head).argmax(1) == getattr(labels, head) for head in NAMES}
    figures = {head: values.float().mean().item() for head, values in right.items()}
    figures |= {f"{head}, clean": values[clean].float().mean().item() for head, values in right.items()}
    each = {name: labels.condition == number for number, name in enumerate(CONDITIONS)}
    return figures | {name: right["condition"][rows].float().mean().item() for name, rows in each.items()}


def train_judge(world: World, loop: Loop) -> dict[str, float]:
    """Fit on all real images but the last `HELD_OUT`; write `judge.safetensors`, and how right it is."""
    features, labels = real_features(world, loop)
    rows = torch.arange(len(labels))
    heads = fit_judge(features[:-HELD_OUT], labels.index(rows[:-HELD_OUT]))
    heads.save(loop.folder / "judge.safetensors")
    figures = accuracy(heads, features[-HELD_OUT:], labels.index(rows[-HELD_OUT:]))
    (loop.folder / "judge.json").write_text(json.dumps({"images": HELD_OUT} | figures, indent=1) + "\n")
    return figures
