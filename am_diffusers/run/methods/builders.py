"""TODO."""

from collections.abc import Callable

from am_diffusers.methods import Method
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.methods.adjoint_matching import adjoint_matching
from am_diffusers.run.methods.buffered_adjoint_matching import buffered_adjoint_matching
from am_diffusers.run.methods.deterministic_adjoint_matching import deterministic_adjoint_matching
from am_diffusers.run.methods.draft import draft, refl
from am_diffusers.run.methods.efficient_adjoint_matching import efficient_adjoint_matching
from am_diffusers.run.methods.flow_grpo import flow_grpo
from am_diffusers.run.methods.ram import ram
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes

METHOD_BUILDERS: dict[str, Callable[[Plan, Model, Reward, Processes], Method]] = {
    "adjoint_matching": adjoint_matching,
    "buffered_adjoint_matching": buffered_adjoint_matching,
    "deterministic_adjoint_matching": deterministic_adjoint_matching,
    "draft": draft,
    "efficient_adjoint_matching": efficient_adjoint_matching,
    "flow_grpo": flow_grpo,
    "ram": ram,
    "refl": refl,
}
