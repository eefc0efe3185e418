"""Settings of a run's rewards, see `config/`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """One learned reward.

    Attributes:
        name: key of `am_diffusers.rewards.REWARDS`, e.g. pickscore or hpsv2.
        model: folder, file, `asset:` path, hub id or `package:` of its weights; null = the released ones.
        revision: branch, tag or commit of a hub model; null = its main branch.
        sha256: checksum of its weight file, checked before loading; null = the pinned one if there is one.
        weight: factor in the trained sum of weight * (score - mean) / std; scores are reported as they are.
        mean: mean score of base samples, in its own units (`scripts/calibrate_rewards.py` measures it).
        std: standard deviation of these scores; the weight then counts base standard deviations.
        mixed_precision: dtype of its towers (no = float32); scores are computed from features in float32.
        mode: how it is trained: differentiable, or rounded to 8 bits as the published path rounds, with
            straight-through gradients, or official, the published path itself, for methods that need no
            gradient; evaluation always takes the published path.
        batch_size: images per pass; null = reward_micro_batch_size.
        device: device it runs on, e.g. cuda:1 where one process has several cards; null = the process's own.
    """

    name: str
    model: str | None = None
    revision: str | None = None
    sha256: str | None = None
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    mode: Literal["differentiable", "rounded", "official"] = "differentiable"
    batch_size: int | None = None
    device: str | None = None
