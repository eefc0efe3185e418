"""Velocity fields of a method, their guidance, and the number of samples handled at once."""

from typing import NamedTuple, TypeVar

from am_diffusers.config import Config
from am_diffusers.config.optimizer import MicroBatch
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.velocity import GuidedField, VelocityField

Field = TypeVar("Field", bound=VelocityField)


def micro_batch(size: MicroBatch | None) -> int | None:
    """Return a micro-batch size as a number; None = all, also for an `auto` that isn't found yet."""
    return None if size == "auto" else size


def guided(field: Field, guidance_scale: float) -> Field | GuidedField[Field]:
    """Return the field with classifier-free guidance; 1.0 = the field itself."""
    return field if guidance_scale == 1 else GuidedField(field, guidance_scale)


class Fields(NamedTuple):
    """Velocity fields of a method, see `Surroundings`."""

    policy: VelocityField
    base: VelocityField
    rollout: VelocityField | None


def with_guidance(config: Config, policy: VelocityField, base: VelocityField) -> Fields:
    """Return the fields of a training iteration, guided where the flags and the method say so."""
    scale = config.shared.rollout_guidance_scale
    everywhere = METHODS[config.method.method].guided_everywhere
    if everywhere or config.shared.guidance_mode == "everywhere":
        return Fields(guided(policy, scale), guided(base, scale), None)
    return Fields(policy, base, None if scale == 1 else guided(policy, scale))


def sizes(config: Config) -> Sizes:
    """Return the numbers of samples handled at once."""
    options = config.optimizer
    return Sizes(
        batch=options.train_batch_size,
        rollout=micro_batch(options.rollout_micro_batch_size),
        reward=micro_batch(options.reward_micro_batch_size),
        offload=options.offload_trajectories,
    )
