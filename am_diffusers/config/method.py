"""The method and its rewards."""

from dataclasses import dataclass

from am_diffusers.config.rewards import RewardConfig
from am_diffusers.methods import DEFAULT_METHOD


@dataclass(frozen=True)
class MethodConfig:
    """Method and rewards.

    Attributes:
        rewards: the trained rewards; their weighted sum is maximised.
        method: fine-tuning method, a key of `am_diffusers.methods.METHODS`.
    """

    rewards: list[RewardConfig]
    method: str = DEFAULT_METHOD
