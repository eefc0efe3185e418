"""Matplotlib figures as SVG elements of an HTML page.

Text stays text: it can be searched, and is set in the font of the reader.
"""

import html
import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from am_diffusers.evaluation.statistics import Array, Estimate
from am_diffusers.system.files import sha256_of_text

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    # Names come from outside: a dollar sign in one is no formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def styled() -> AbstractContextManager[None]:
    """Return a context in which figures have the style of the report."""
    return matplotlib.rc_context(STYLE)


def whiskers(estimates: Sequence[Estimate]) -> Array:
    """Return the distances from values to the ends of their intervals, (2, N); 0 where there is none."""
    low = [e.value - e.low if e.low is not None else 0 for e in estimates]
    high = [e.high - e.value if e.high is not None else 0 for e in estimates]
    # An end can lie on the wrong side of its value by rounding.
    return np.maximum([low, high], 0)


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure with one panel, `width` by `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend_above(figure: Figure) -> None:
    """Draw the legend of the figure's panel in rows above it, where it can't hide a curve.

    The figure grows by the legend's height, so that the panel keeps its size however many rows there are.
    """
    pixels = figure.bbox.width
    for columns in (2, 1):
        legend = figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=1.6)
        size = legend.get_window_extent()
        if size.width <= pixels or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def to_svg(figure: Figure, description: str) -> str:
    """Return the figure as an element for an HTML page, with ids of its own among other figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": ""}), warnings.catch_warnings():
        # The reader's font has the characters that the one measured here lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    own = f"f{sha256_of_text(text)[:8]}-"
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
