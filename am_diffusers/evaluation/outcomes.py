"""Each reward's mean for base, tuned model and tilt side by side: what was predicted, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.statistics import RESAMPLES, Array, Estimate, estimate


@dataclass(frozen=True)
class Outcome:
    """Mean score of a reward, trained or held-out, by the chain of training.

    Attributes:
        base: mean of the base's images.
        tuned: mean of the tuned model's images: the base's, and the difference of pairs with the same noise.
        predicted: mean under the tilt, from base images alone; None where they can't tell.
        surplus: tuned less predicted; None with it.
    """

    base: Estimate
    tuned: Estimate
    predicted: Estimate | None
    surplus: Estimate | None

    def text(self) -> str:
        """Say what became of the score, what the tilt's is, and whether the two differ."""
        found = f"{self.base.value:.4g} -> {self.tuned.text('.4g')}"
        if self.predicted is None or self.surplus is None:
            return found
        return f"{found}; the tilt has {self.predicted.text('.4g')}, {self._verdict(self.surplus)}"

    def _verdict(self, surplus: Estimate) -> str:
        if surplus.low is None or surplus.high is None:
            return f"{surplus.value:+.2g} from it"
        if surplus.low <= 0 <= surplus.high:
            return "no different"
        return f"{'short of' if surplus.value < 0 else 'beyond'} it by {abs(surplus.value):.2g}"


def outcomes(
    frontier: Frontier,
    scale: float,
    tuned: Mapping[str, Array],
    *,
    known: bool,
    resamples: int = RESAMPLES,
) -> dict[str, Outcome]:
    """Return the outcome of each score, means over prompts with their intervals.

    Args:
        frontier: scores of the base's images, (P prompts, N images) each.
        scale: reward_scale of the run.
        tuned: scores of the tuned model's images from the noise of the first S <= N, (P, S) each.
        known: whether the base images can tell the tilt.
        resamples: number of resamples of the bootstrap.
    """

    def mean(values: Array, span: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
        return estimate(np.mean, values, span=span, resamples=resamples)

    tilted, found = frontier.tilt(scale), {}
    for name, scores in tuned.items():
        base = frontier.scores[name]
        level = base.mean(axis=1) + (scores - base[:, : scores.shape[1]]).mean(axis=1)
        predicted = tilted.scores[name]
        # No mean is beyond all scores: a share ends at 1.
        span = float(min(base.min(), scores.min())), float(max(base.max(), scores.max()))
        found[name] = Outcome(
            base=mean(base.mean(axis=1), span),
            tuned=mean(level, span),
            predicted=mean(predicted, span) if known else None,
            surplus=mean(level - predicted) if known else None,
        )
    return found
