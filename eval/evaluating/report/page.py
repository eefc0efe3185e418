"""report.html: everything a reader needs to believe or doubt a difference, in one page that loads nothing.

The page is readable without its script, which adds the slider, menus, search and sorting. Nothing of it may
come from elsewhere: its Content-Security-Policy allows inline style, the one script by its hash, and `data:`
images.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from am_diffusers.system.files import write_text
from am_diffusers.system.text import redact
from evaluating.report import numbers as wording
from evaluating.report.context import report_context
from evaluating.report.findings import read_findings, verdict
from evaluating.report.images import embed_images
from evaluating.summary.results import Results
from evaluating.summary.summary import Summary

HERE = Path(__file__).parent


def write_report(
    results: Results, summary: Summary, file: Path, *, max_prompts: int = 100, image_side: int = 384
) -> Path:
    """Write the report; an earlier one is replaced.

    Args:
        results: complete results, with at least one tuned candidate.
        summary: summary of the same results.
        file: file of the page.
        max_prompts: prompts whose images are embedded: largest gains, largest losses, then evenly.
        image_side: embedded images larger than 128 pixels are made this large.

    Returns:
        `file`.

    Raises:
        ValueError: if there is no tuned candidate, or an image is missing or damaged.
    """
    if not results.tuned:
        raise ValueError("report: expected a tuned candidate to compare, got bases only; evaluate a LoRA")
    embedded = embed_images(results, max_prompts, image_side)
    context = report_context(results, summary, read_findings(results, summary), embedded)
    # A browser hashes a script with its line ends as \n, however git checked it out.
    script = "\n".join((HERE / "report.js").read_text("utf-8").splitlines())
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            context,
            style=Markup((HERE / "report.css").read_text("utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    # Prompts read from JSON may hold halves of characters, which no file can.
    write_text(file, page.encode("utf-8", "replace").decode())
    return file


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": wording.plain,
        "change": wording.change,
        "signed": wording.signed,
        "share": wording.share,
        "digits": wording.digits,
        "p_value": wording.p_value,
        "verdict": verdict,
        "redact": redact,  # paths may hold tokens
    }
    return environment
