"""Densities of the tuned laws over the tilt's density, one small plot per row, from the committed results."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from am_diffusers.system.files import write_whole
from benching.oracles.problems import PROBLEMS
from benching.oracles.records import BIN_EDGES, DATA, DRAWN, Key, load
from benching.oracles.variants import VARIANTS

(PROBLEM, SEED), COLUMNS = DRAWN, 4
STYLES = {"ode": ("#d1495b", "-"), "sde": ("#00798c", "--")}
TOP = 1.5
"""Top of the density axis; a law that has collapsed goes beyond it."""


def write_figure(file: Path, folder: Path = DATA) -> None:
    """Draw every row that was run on `PROBLEM`; draw nothing if none was."""
    rows = [name for name in VARIANTS if load(Key(PROBLEM, name, SEED), folder) is not None]
    if not rows:
        return
    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 1.9 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, rows, strict=False):
        _draw(axis, name, folder)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{PROBLEMS[PROBLEM].title}: density of what is sampled, seed {SEED}")
    write_whole(file, lambda part: figure.savefig(part, format="png", dpi=110))


def _draw(axis: Axes, name: str, folder: Path) -> None:
    """Draw one row: the tilt's density as an area, the base's as a dotted line, the tuned laws' as lines."""
    record, problem = load(Key(PROBLEM, name, SEED), folder), PROBLEMS[PROBLEM]
    assert record is not None
    middle: Tensor = (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2
    for law, label in ((problem.tilt(), "tilt"), (problem.law, "untuned base")):
        height = law.log_density(middle[:, None], 0.0).exp()
        if label == "tilt":
            axis.fill_between(middle, height, color="#d9d9d9", label=label)
        else:
            axis.plot(middle, height, color="#8c8c8c", lw=0.9, ls=":", label=label)
    for sampler, (colour, style) in STYLES.items():
        values = record["densities"].get(sampler)
        if values is not None:
            axis.plot(middle, values, color=colour, ls=style, lw=1.3, label=f"tuned, {sampler.upper()}")
    axis.set_title(VARIANTS[name].title, fontsize=8)
    axis.set_ylim(0, TOP)
    axis.set_xlim(-2.2, 2.4)
    axis.tick_params(labelsize=7)
