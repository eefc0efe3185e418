"""The parts of a gradient's noise, on made-up gradients whose parts are known."""

import gradient_noise
import numpy as np
import pytest

N, S, D = 400, 4, 50


def products(signal: float, own: float, steps: float) -> np.ndarray:
    """Of rows that share a mean of length `signal`, a part of their sample's own, and one of their step."""
    rng = np.random.default_rng(0)
    mean = np.full(D, signal / np.sqrt(D)) / S
    samples = own / np.sqrt(D) * rng.standard_normal((N, 1, D)) / S
    rows = mean + samples + steps / np.sqrt(D) * rng.standard_normal((N, S, D)) / S
    return np.einsum("isd,jtd->isjt", rows, rows)


@pytest.mark.parametrize(
    ("kind", "factor_of_samples", "own_factor_of_steps", "factor_of_steps"),
    [
        # All rows: the steps' parts are the trajectory's own too, and average over the S rows.
        ("all", 1, 1 / S, 1 / S),
        ("one at random", 1, 1 / S, 1),
        # Two of S rows count 2 / S of the mean: the last always, the mean of the S - 1 others or one of them.
        ("the last and one", (2 / S) ** 2, (1 + 1 / (S - 1)) / S**2, 2 / S**2),
    ],
)
def test_signal_and_the_trajectorys_share_are_found(
    kind: str, factor_of_samples: float, own_factor_of_steps: float, factor_of_steps: float
) -> None:
    signal, own, steps = 0.5, 1.0, 2.0
    factors = np.array(gradient_noise.draws_of(kind, S))
    ratio, share = gradient_noise.figures(products(signal, own, steps), factors, 16, np.arange(N))
    noise = own**2 * factor_of_samples + steps**2 * factor_of_steps
    trajectory = own**2 * factor_of_samples + steps**2 * own_factor_of_steps
    seen = signal * np.sqrt(factor_of_samples)
    # Sampling error of N = 400 samples: some percent.
    assert share == pytest.approx(trajectory / noise, rel=0.05)
    assert ratio == pytest.approx(seen * np.sqrt(16 / noise), rel=0.15)


def test_the_interval_of_a_mean_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).standard_normal(30)
    monkeypatch.setattr(gradient_noise, "SAMPLES", 30)
    text = gradient_noise.with_interval(lambda keep: float(values[keep].mean()))
    assert text == f"{values.mean():.2f} +- {1.96 * values.std(ddof=1) / np.sqrt(30):.2f}"
