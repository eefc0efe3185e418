"""What a run is told of its rewards, see `config/`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """One learned reward.

    Attributes:
        name: which reward, a key of `am_diffusers.rewards.REWARDS`, e.g. pickscore or hpsv2.
        model: folder, file, `asset:` path, hub id or `package:` of its weights; null = the released ones.
        revision: branch, tag or commit of a hub model; null = its main branch.
        sha256: of its weight file, checked before it is read; null = the pinned one if there is one.
        weight: factor in the trained sum of weight * (score - mean) / std; scores are reported as they are.
        mean: mean score of base samples, in its own units (`scripts/calibrate_rewards.py` measures it).
        std: their standard deviation; the weight then counts base standard deviations.
        mixed_precision: dtype of its towers (no = float32); scores are computed from features in float32.
        mode: how it is trained: differentiable, or rounded to 8 bits as the published path rounds, with
            straight-through gradients, or official, the published path itself, for methods that need no
            gradient; evaluation always takes the published path.
        batch_size: pictures a pass; null = reward_micro_batch_size.
        device: where it runs, e.g. cuda:1; null = the process's own device.
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


@dataclass(frozen=True)
class TerminalConfig:
    """What becomes of the reward's gradient. The defaults aim at base * exp(reward_scale * reward).

    Attributes:
        divergence: distance from the base that 1 / reward_scale weighs, see `am_diffusers.divergences`.
        divergence_q: exponent of divergence power: > 0 saturates, in [-1, 0) seeks the best reward.
        divergence_samples: base pictures a prompt from which normalisers are estimated, at least 2.
        divergence_prompts: up to so many training prompts each has a normaliser, beyond they share one.
        divergence_max_slope: largest factor by which a divergence other than kl may scale a gradient.
        reward_smoothing_std: noise added to final latents before the reward, in latent units; 0 = off.
        reward_smoothing_samples: noisy copies averaged over, an even number.
        reward_clip_quantile: reward gradients are shortened to this running quantile of their norms, in
            (0, 1); null = off.
    """

    divergence: Literal["kl", "power", "pearson_chi2", "forward_kl", "js"] = "kl"
    divergence_q: float = 0.5
    divergence_samples: int = 16
    divergence_prompts: int = 64
    divergence_max_slope: float = 10.0
    reward_smoothing_std: float = 0.0
    reward_smoothing_samples: int = 4
    reward_clip_quantile: float | None = None
