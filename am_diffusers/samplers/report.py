"""The report of a sampler's run, in Markdown: numbers beside their floor, and what they don't say."""

from collections.abc import Mapping
from typing import Any

from am_diffusers.samplers.base import Sampler
from am_diffusers.samplers.metrics import ENOUGH_SHARE

NAMES = {
    "transport": "optimal-transport cost (exact, mean squared distance)",
    "mass_error": "total variation of mode masses",
    "modes_found": "modes found",
    "mean_energy": "mean energy",
}


def render(sampler: Sampler, options: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        sampler: after training.
        options: options of the run.
        numbers: `samples`, `resampled` and `floor` as `metrics.measure` gives them, empty where there are
            none; `weights` as `metrics.path_weights`; `energy_evaluations`, `cpu_seconds` and `log_z_exact`.
    """
    weights = numbers["weights"]
    lines = [
        f"# {options['energy']}, {sampler.energy.dimension} dimensions, by {type(sampler).title}",
        "",
        f"[arXiv {sampler.paper}](https://arxiv.org/abs/{sampler.paper}), seed {options['seed']}, "
        f"{sampler.settings.iterations} iterations, {numbers['energy_evaluations']} energies with gradients, "
        f"{numbers['cpu_seconds']:.0f} CPU seconds, {options['num_samples']} samples.",
        "",
        *table(numbers),
        "",
        *_about_weights(weights, numbers["log_z_exact"]),
    ]
    if not numbers["resampled"]:
        lines.append(f"Below {ENOUGH_SHARE:.0%} nothing is resampled: a few paths would be all there is.")
    lines += ["", "![samples on the density](samples.png)", "", *cautions(numbers), ""]
    settings = ", ".join(f"{name} {value}" for name, value in vars(sampler.settings).items())
    return "\n".join([*lines, f"Settings: {settings}.", ""])


def table(numbers: Mapping[str, Any]) -> list[str]:
    """Return the table of measures: samples, samples by path weights, exact samples."""
    columns = {"samples": "samples", "resampled": "resampled by path weights", "floor": "two exact sets"}
    shown = {name: title for name, title in columns.items() if numbers[name]}
    lines = ["| | " + " | ".join(shown.values()) + " |", "|---|" + "---|" * len(shown)]
    for key, title in NAMES.items():
        values = [numbers[name].get(key) for name in shown]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _about_weights(weights: Mapping[str, float], log_z: float | None) -> list[str]:
    exact = "unknown" if log_z is None else f"{log_z:.4g}"
    return [
        f"Path weights: lower bound of log Z {weights['elbo']:.4g}, log Z by importance "
        f"{weights['log_z']:.4g} (exact: {exact}), effective share {weights['effective_share']:.1%}."
    ]


def cautions(numbers: Mapping[str, Any]) -> list[str]:
    """Return what the numbers say against the run, if anything, and what they can't say; see `render`."""
    lines = [
        "A low matching loss isn't convergence, nor is a good bound: gradients of an energy don't see the "
        "masses of modes far apart, and modes that no path has met have no weight.",
        "Published Sinkhorn costs of such benchmarks are not comparable with the exact cost: they lie below "
        "what two exact sets of samples have.",
    ]
    floor, samples = numbers["floor"], numbers["samples"]
    if floor and samples["transport"] > 1.5 * floor["transport"]:
        times = samples["transport"] / floor["transport"]
        lines.insert(0, f"**Not converged**: the transport cost is {times:.1f} times that of exact samples.")
    elif not floor and numbers["weights"]["effective_share"] < ENOUGH_SHARE:
        lines.insert(0, "**Not converged**, by its own path weights.")
    return lines
