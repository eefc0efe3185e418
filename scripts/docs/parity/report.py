"""Results of the parity check as a Markdown table."""

from typing import Any

from .compare import QUANTITIES


def table(document: dict[str, Any]) -> str:
    """Return the Markdown of a results document."""
    lines = [
        f"`{document['command']}`: seed {document['seed']}, {document['threads']} threads, float32, CPU,"
        f" Python {document['python']}.",
        f"Original packages: {_versions(document['their_versions'])}.",
        f"Ours: {_versions(document['our_versions'])}.",
        "",
        "| model | parameters | compared | numbers | relative difference | limit | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        mark = "" if row["passed"] else " **fails**"
        lines.append(
            f"| {row['reward']}, {row['size']} | {row['parameters']:,} | {QUANTITIES[row['quantity']]} |"
            f" {row['count']:,} | {row['difference']:.2g}{mark} | {row['limit']:g} | {row['spread']:.2g} |"
        )
    return "\n".join(lines)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
