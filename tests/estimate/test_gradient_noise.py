"""The parts of a gradient's noise, on made-up gradients whose parts are known."""

import gradient_noise
import numpy as np
import pytest

N, S, D, B = 400, 4, 50, 16


def products(signal: float, own: float, steps: float, shared: float) -> np.ndarray:
    """Of rows with a mean of length `signal`, parts of their sample, of each row, and of the step."""
    rng = np.random.default_rng(0)
    unit = np.eye(D)
    mean = signal * unit[0] / S
    # Parts that steps have in common sum to 0 over all steps.
    pattern = shared * np.array([1, -1] * (S // 2))[None, :, None] * unit[1] / S
    samples = own / np.sqrt(D) * rng.standard_normal((N, 1, D)) / S
    rows = mean + pattern + samples + steps / np.sqrt(D) * rng.standard_normal((N, S, D)) / S
    return np.einsum("isd,jtd->isjt", rows, rows)


@pytest.mark.parametrize("shared", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all", "one at random", "the last and one at random"])
def test_signal_and_the_trajectorys_share_are_found(kind: str, shared: float) -> None:
    """Against the variances of the parts, drawn by drawn; sampling errors of 400 samples are some percent."""
    signal, own, steps = 0.5, 1.0, 2.0
    factors = np.array(gradient_noise.draws_of(kind, S))
    ratio, share = gradient_noise.figures(products(signal, own, steps, shared), factors, B, np.arange(N))
    mean = factors.mean(0)
    pattern = shared * (factors / S) @ np.array([1, -1] * (S // 2))
    seen = np.array([signal * mean.sum() / S, pattern.mean()])
    scatter = np.mean([own**2 * draw.sum() ** 2 + steps**2 * (draw**2).sum() for draw in factors]) / S**2
    trajectory = (own**2 * mean.sum() ** 2 + steps**2 * (mean**2).sum()) / S**2
    noise = scatter / B + pattern.var()
    assert share == pytest.approx(trajectory / B / noise, rel=0.06)
    assert ratio == pytest.approx(np.linalg.norm(seen) / np.sqrt(noise), rel=0.15)


def test_the_interval_of_a_mean_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).standard_normal(30)
    monkeypatch.setattr(gradient_noise, "SAMPLES", 30)
    text = gradient_noise.with_interval(lambda keep: float(values[keep].mean()))
    assert text == f"{values.mean():.2f} +- {1.96 * values.std(ddof=1) / np.sqrt(30):.2f}"
