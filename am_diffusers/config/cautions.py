"""Settings that are allowed and seldom wise: said in the dry run and when a run starts."""

from am_diffusers.config import Config
from am_diffusers.config.belonging import READ_BY
from am_diffusers.methods.parts.advantages import SMALL_GROUP


def cautions(config: Config) -> list[str]:
    """What a user should know of these settings before the run, a sentence each."""
    found, group = [], config.method.samples_per_prompt
    normalised = config.baselines.advantages == "normalised" and config.method.method in READ_BY["advantages"]
    if normalised and group < SMALL_GROUP:
        extreme = " (with 2 every advantage is +-reward_scale, whatever the rewards)" if group == 2 else ""
        found.append(
            f"--advantages normalised divides by the deviation of samples_per_prompt = {group} rewards, "
            f"which for so few is no tilt by reward / deviation{extreme}: set --samples_per_prompt "
            f"{SMALL_GROUP} or more, or --advantages centred"
        )
    return found
