"""Results of scripts as JSON, and their tables in docs/rewards.md."""

import json
from pathlib import Path
from typing import Any

from am_diffusers.system.text import replace_table


def write_results(document: dict[str, Any], file: Path, table: str) -> None:
    """Write results as JSON, and their table into rewards.md beside it, under the file's name."""
    page = file.with_name("rewards.md")
    text = replace_table(page.read_text("utf-8"), file.stem, table)
    file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    page.write_text(text, "utf-8")
