"""Fine-tuning methods, one file each; METHODS maps the name used in a config to the class."""

from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.base import Method
from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching
from am_diffusers.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
from am_diffusers.methods.draft import DRaFT
from am_diffusers.methods.efficient_adjoint_matching import EfficientAdjointMatching
from am_diffusers.methods.flow_grpo import FlowGRPO
from am_diffusers.methods.ram import RAM
from am_diffusers.methods.refl import ReFL
from am_diffusers.methods.reward_weighted_matching import RewardWeightedMatching

DEFAULT_METHOD = "adjoint_matching"

METHODS: dict[str, type[Method]] = {
    "adjoint_matching": AdjointMatching,
    "buffered_adjoint_matching": BufferedAdjointMatching,
    "efficient_adjoint_matching": EfficientAdjointMatching,
    "deterministic_adjoint_matching": DeterministicAdjointMatching,
    "ram": RAM,
    "reward_weighted_matching": RewardWeightedMatching,
    "draft": DRaFT,
    "refl": ReFL,
    "flow_grpo": FlowGRPO,
}
