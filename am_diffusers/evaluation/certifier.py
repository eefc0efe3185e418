"""Images of the tuned model by the chain of training, and the certificate that they and the base's make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from am_diffusers.evaluation.certificate import Certificate, Tuned, certify
from am_diffusers.evaluation.frontier import Frontier, total_reward
from am_diffusers.evaluation.images import Sampler
from am_diffusers.evaluation.scores import PATH_KL, score_images
from am_diffusers.evaluation.statistics import metrics_of
from am_diffusers.rewards import Reward, RewardScale
from am_diffusers.system.processes import Processes
from am_diffusers.velocity import VelocityField


@dataclass(frozen=True)
class Certifier:
    """Certifies the tuned model as it is when called.

    Attributes:
        frontier: scores of the base's images of `prompts` by the same sampler.
        scale: reward_scale of the run.
        sampler: makes images by the chain of training, from the noise of the base's images.
        base: field before fine-tuning.
        tuned: field after fine-tuning.
        rewards: trained and held-out rewards.
        trained: scales of the rewards in their sum.
        prompts: P prompts.
        images_per_prompt: S images a prompt, at most as many as the frontier's.
        processes: share the images.
    """

    frontier: Frontier
    scale: float
    sampler: Sampler
    base: VelocityField
    tuned: VelocityField
    rewards: Sequence[Reward]
    trained: Mapping[str, RewardScale]
    prompts: Sequence[str]
    images_per_prompt: int
    processes: Processes

    def __call__(self) -> Certificate:
        """Certify the tuned model; all processes call it, inside `processes.together()`."""
        return certify(self.frontier, self.scale, self.score())

    def score(self) -> Tuned:
        """Make and score the images, as `__call__` does."""
        scores = score_images(
            self.sampler,
            self.tuned,
            self.rewards,
            self.prompts,
            self.images_per_prompt,
            processes=self.processes,
            base=self.base,
        )
        tables = {name: each.numpy() for name, each in scores.items()}
        path_kl = tables.pop(PATH_KL)
        return Tuned(total_reward(tables, self.trained), path_kl, tables)


def certificate_metrics(certificate: Certificate) -> dict[str, float]:
    """Return the numbers that are known under the names they're logged by, `validation/tilt_gap` etc."""
    found = {"validation/effective_share": certificate.effective_share}
    for name, each in certificate.estimates.items():
        found |= metrics_of(f"validation/{name}", each)
    for name, outcome in certificate.outcomes.items():
        found |= metrics_of(f"validation/{name}_chain", outcome.tuned)
        found |= metrics_of(f"validation/{name}_predicted", outcome.predicted)
    return found
