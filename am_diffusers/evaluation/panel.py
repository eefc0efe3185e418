"""The reward-hacking panel: a run's curves in one image, drawn from what the run has written so far.

A model that fools its reward shows: the trained reward rises while the held-out one stalls or falls, path KL
and adjoint norms grow without end, diversity goes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.plane import draw_plane
from am_diffusers.evaluation.scores import load_scores
from am_diffusers.rewards import RewardScale
from am_diffusers.system.files import read_lines, write_whole

Lines = Sequence[Mapping[str, float]]
SIZE = (14, 10.5)
DPI = 100
# Okabe and Ito's palette, which colour-blind readers can tell apart; the first is for what is trained.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
ADJOINT = "adjoint_norm/"
CERTIFICATE_FILE = "certificate.json"


def draw_panel(folder: Path) -> Path:
    """Draw `samples/panel.png` of a running or finished run, 1400 pixels wide; an earlier one is replaced.

    Args:
        folder: output folder of the run, with config.yaml, metrics.jsonl and validation.jsonl.

    Returns:
        The image's path.

    Raises:
        ValueError: if the folder has no config.yaml or none of the metrics yet.
    """
    config, training = folder / "config.yaml", read_lines(folder / "metrics.jsonl")
    validation = read_lines(folder / "validation.jsonl")
    if not config.exists() or not (training or validation):
        raise ValueError(f"{folder}: expected the output folder of a run, with config.yaml and metrics.jsonl")
    settings, frontier = yaml.safe_load(config.read_text("utf-8")), None
    if any("validation/gain" in line for line in validation):
        trained = {r["name"]: RewardScale(r["weight"], r["mean"], r["std"]) for r in settings["rewards"]}
        frontier = Frontier.of(load_scores(folder / CERTIFICATE_FILE), trained)
    figure = panel_figure(settings, training, validation, frontier)
    path = folder / "samples/panel.png"
    write_whole(path, lambda part: figure.savefig(part, format="png"))
    return path


def panel_figure(
    config: Mapping[str, object], training: Lines, validation: Lines, frontier: Frontier | None = None
) -> Figure:
    """Draw all curves of a run.

    Args:
        config: the resolved config; `output_dir`, `rewards` and `max_grad_norm` are read.
        training: lines of metrics.jsonl.
        validation: lines of validation.jsonl.
        frontier: scores of base images of the validation prompts, if there are any.
    """
    with matplotlib.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 10}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        done = max([line["iteration"] + 1 for line in training] + [line["iteration"] for line in validation])
        figure.suptitle(f"{config['output_dir']}, iterations: {done}", fontsize=13)
        grid = figure.add_gridspec(3, 3)
        rewards = config["rewards"]
        trained = [reward["name"] for reward in rewards] if isinstance(rewards, list) else []
        _gains(figure.add_subplot(grid[0, :2]), validation, trained)
        _diversity(figure.add_subplot(grid[0, 2]), validation)
        _noisy(figure.add_subplot(grid[1, 0]), training, "path_kl", "Path KL from the base", "path KL (nats)")
        _adjoints(figure.add_subplot(grid[1, 1]), training)
        draw_plane(figure.add_subplot(grid[1, 2]), validation, frontier)
        _noisy(
            figure.add_subplot(grid[2, 0]),
            training,
            "reward",
            "Reward of the rollouts",
            "weighted sum of rewards",
        )
        _noisy(figure.add_subplot(grid[2, 1]), training, "loss", "Loss", "loss (squared velocity)", log=True)
        _gradients(figure.add_subplot(grid[2, 2]), training, config["max_grad_norm"])
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_xlabel() == "iteration":
                axes.set_xlim(-0.03 * max(done, 1), 1.03 * max(done, 1))
    return figure


def _start(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a metric where it was measured."""
    found = [(line["iteration"], line[name]) for line in lines if name in line]
    iterations, values = zip(*found, strict=True) if found else ((), ())
    return np.array(iterations, dtype=float), np.array(values, dtype=float)


def _empty(axes: Axes, text: str = "not measured yet") -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _interval_curve(axes: Axes, lines: Lines, name: str, label: str, colour: str, style: str) -> None:
    """Draw a curve with a marker at each validation and its 95 % band."""
    iterations, values = _series(lines, name)
    axes.plot(iterations, values, style, color=colour, marker="o", markersize=4, label=label)
    _, low = _series(lines, f"{name}_low")
    _, high = _series(lines, f"{name}_high")
    axes.fill_between(iterations, low, high, color=colour, alpha=0.15, linewidth=0)


def _gains(axes: Axes, lines: Lines, trained: Sequence[str]) -> None:
    _start(
        axes,
        "Reward gain on validation images (trained up but held-out down: reward hacking)",
        "gain (base sd)",
    )
    suffix = "_gain"
    found = {key for line in lines for key in line if key.endswith(suffix)}
    names = sorted(key.removeprefix("validation/").removesuffix(suffix) for key in found)
    if not names:
        _empty(axes)
        return
    axes.axhline(0, color=GREY, linewidth=0.8)
    for place, name in enumerate(sorted(names, key=lambda name: name not in trained)):
        role, style = ("trained", "-") if name in trained else ("held-out", "--")
        colour = COLOURS[place % len(COLOURS)]
        _interval_curve(axes, lines, f"validation/{name}{suffix}", f"{name} ({role})", colour, style)
    axes.legend(loc="best", ncols=2)


def _diversity(axes: Axes, lines: Lines) -> None:
    _start(axes, "Diversity kept on validation images", "of the base's (%)")
    if not any("validation/diversity_kept" in line for line in lines):
        _empty(axes)
        return
    axes.axhline(1, color=GREY, linewidth=0.8)
    _interval_curve(axes, lines, "validation/diversity_kept", "", COLOURS[0], "-")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")


def _noisy(axes: Axes, lines: Lines, name: str, title: str, unit: str, *, log: bool = False) -> None:
    """Draw a metric of each iteration, faint, and its running median."""
    _start(axes, title, unit)
    iterations, values = _series(lines, name)
    if not len(values):
        _empty(axes)
        return
    axes.plot(iterations, values, color=COLOURS[0], linewidth=1, alpha=0.35)
    axes.plot(*running_median(iterations, values), color=COLOURS[0], linewidth=1.8)
    if log and (values > 0).all():
        _log_scale(axes)


class PlainLog(LogFormatter):
    """Numbers as `{:g}`, at the ticks that matplotlib labels: some of those between few powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick at `x`; empty for most of the minor ones."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainLog())
    axes.yaxis.set_minor_formatter(PlainLog(minor_thresholds=(1, 0.4)))


def running_median(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and the median there of values and their neighbours, a tenth of them all.

    Single outliers don't bend it. It starts at the first value, as many metrics rise fast from there, and has
    at most 500 points, so that a long run is drawn as fast as a short one.
    """
    reach = len(values) // 20
    rows = np.unique(np.linspace(0, len(values) - 1, min(len(values), 500)).round().astype(int))
    medians = [np.median(values[max(0, row - reach) : row + min(row, reach) + 1]) for row in rows]
    return iterations[rows], np.array(medians)


def _adjoints(axes: Axes, lines: Lines) -> None:
    """One curve a denoising step, by colour."""
    _start(axes, "Adjoint norm by denoising step", "norm (1 / latent unit)")
    names = sorted({key for line in lines for key in line if key.startswith(ADJOINT)})
    if not names:
        _empty(axes)
        return
    steps = [int(name.removeprefix(ADJOINT)) for name in names]
    colours = matplotlib.colormaps["viridis"].resampled(len(steps))
    for place, name in enumerate(names):
        axes.plot(*running_median(*_series(lines, name)), color=colours(place), linewidth=1.2)
    if all((_series(lines, name)[1] > 0).any() for name in names):
        _log_scale(axes)
    edges = np.arange(len(steps) + 1) + min(steps) - 0.5
    bar = axes.figure.colorbar(ScalarMappable(BoundaryNorm(edges, len(steps)), colours), ax=axes)
    bar.set_label("step (last: clean)")
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    bar.ax.minorticks_off()


def _gradients(axes: Axes, lines: Lines, limit: object) -> None:
    """Gradient norm on the left, learning rate on the right."""
    _noisy(axes, lines, "grad_norm", "Gradient norm before clipping", "norm", log=True)
    iterations, rates = _series(lines, "learning_rate")
    if not len(rates):
        return
    axes.axhline(float(str(limit)), color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(
        "max_grad_norm", (0, float(str(limit))), (2, 3), textcoords="offset points", fontsize=9, color=GREY
    )
    right = axes.twinx()
    right.plot(iterations, rates, "--", color=COLOURS[1], linewidth=1.4)
    right.set_ylabel("learning rate", color=COLOURS[1])
    right.tick_params(axis="y", labelcolor=COLOURS[1])
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    right.set_ylim(bottom=0)
