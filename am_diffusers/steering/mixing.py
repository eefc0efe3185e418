"""Diagnostics of Markov chains: split R-hat and effective sample size (Vehtari et al., arXiv 1903.08008).

Twenty lines of numpy instead of ArviZ, which would bring xarray and more packages for two numbers; tested on
autoregressions, whose effective size is known.
"""

import numpy as np

from am_diffusers.evaluation.statistics import Array


def split_rhat(draws: Array) -> float:
    """Return the potential scale reduction of chains cut into halves: 1 where all agree.

    Args:
        draws: (T >= 4 steps, C chains).
    """
    halves = _halves(draws)
    within, total = _variances(halves)
    return float(np.sqrt(total / within)) if within > 0 else 1.0


def effective_size(draws: Array) -> float:
    """Return the number of independent draws that tell the mean as well (Geyer's initial sequence).

    Args:
        draws: (T >= 4 steps, C chains).
    """
    halves = _halves(draws)
    steps, chains = halves.shape
    within, total = _variances(halves)
    if not total > 0:
        return float(steps * chains)
    centred = halves - halves.mean(axis=0)
    lags = np.array(
        [(centred[: steps - lag] * centred[lag:]).sum(axis=0).mean() / steps for lag in range(steps)]
    )
    correlation = 1 - (within - lags * steps / (steps - 1)) / total
    pairs = correlation[: steps // 2 * 2].reshape(-1, 2).sum(axis=1)
    first_negative = int(np.argmax(pairs < 0)) if (pairs < 0).any() else len(pairs)
    monotone = np.minimum.accumulate(pairs[:first_negative])
    time = max(2 * monotone.sum() - 1, 1 / np.log10(steps * chains))
    return float(steps * chains / time)


def _halves(draws: Array) -> Array:
    half = len(draws) // 2
    if half < 2:
        raise ValueError(f"expected at least 4 draws of each chain, got {len(draws)}")
    return np.concatenate([draws[:half], draws[-half:]], axis=1)


def _variances(halves: Array) -> tuple[float, float]:
    """Return the variance within chains, and that of all together."""
    steps = len(halves)
    within = float(halves.var(axis=0, ddof=1).mean())
    between = float(halves.mean(axis=0).var(ddof=1))
    return within, (steps - 1) / steps * within + between
