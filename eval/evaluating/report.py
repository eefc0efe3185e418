"""report.html: everything a reader needs to believe or doubt a difference, in one page that asks no network.

The page is readable without its script, which adds the slider, menus, search and sorting. Nothing of it may come
from elsewhere: its Content-Security-Policy allows inline style, the one script by its hash, and `data:` pictures.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluating.findings import read_findings
from evaluating.report_context import report_context
from evaluating.report_pictures import embed_pictures
from evaluating.results import Results
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from am_diffusers.evaluation import Interval

HERE = Path(__file__).parent


def write_report(
    results: Results, summary: Mapping[str, Any], file: Path, *, max_prompts: int = 100, picture_side: int = 384
) -> Path:
    """Write the report; an earlier one is replaced.

    Args:
        results: complete results, with at least one tuned candidate.
        summary: summary.json of the same results.
        file: of the page.
        max_prompts: prompts whose pictures are embedded: largest gains, largest losses, then evenly.
        picture_side: embedded pictures larger than 128 pixels are made this large.

    Returns:
        `file`.

    Raises:
        ValueError: if there is no tuned candidate, or a picture is missing or damaged.
    """
    if not results.tuned:
        raise ValueError("report: expected a tuned candidate to compare, got bases only; evaluate a LoRA")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": signed, "share": share, "nats": nats, "p_value": p_value, "plain": "{:.4g}".format}
    embedded = embed_pictures(results, max_prompts, picture_side)
    script = (HERE / "report.js").read_text("utf-8")
    page = environment.get_template("report.html.jinja").render(
        **report_context(results, read_findings(results, summary), embedded),
        style=Markup((HERE / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    part = file.with_suffix(".part")
    # The hash is of these very characters: no translation of line ends.
    part.write_text(page, "utf-8", "replace", newline="\n")
    os.replace(part, file)
    return file


def signed(interval: Interval) -> str:
    """`+0.53 [+0.41, +0.66]`."""
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def share(interval: Interval) -> str:
    """`97 % [87 %, 109 %]`."""
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]".replace("%", " %")


def nats(interval: Interval) -> str:
    """`12.3 [10.1, 14.8]`."""
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def p_value(value: float) -> str:
    """Two digits, or that it is tiny."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
