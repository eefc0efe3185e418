"""Compare HPSv2 and ImageReward with the original packages hpsv2 and image-reward, on equal random weights.

    make parity      # the environment of the packages, all models, and the results into docs
    python scripts/docs/check_parity.py --python .venv-parity/bin/python --sizes small

The packages run in an environment of their own (requirements/parity.txt) as a subprocess; the sides exchange
files in a temporary folder, which needs 4 GB for the full-size ViT-H/14, and 10 GB of memory. Exits with 1 if
a difference is larger than 1e-5 relative to the largest number. Released weights are not measured here.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from doc_tables import write_results
from parity.cases import REWARDS, SIZES, Case, write_weights
from parity.compare import compare
from parity.ours import score
from parity.report import table

from am_diffusers.system.paths import path_flag

ORIGINALS = Path(__file__).parent / "parity" / "originals.py"
VERSIONS = ("torch", "torchvision", "transformers", "open_clip_torch", "numpy", "pillow")


def run_case(case: Case, python: Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare one model: return its rows of the table, and the versions of the packages.

    Args:
        case: model, weights and inputs.
        python: Python of the packages' environment.
        folder: empty folder for weights and results.
    """
    case.write(folder)
    run_originals(python, "shapes", folder)
    parameters = write_weights(folder, case.seed)
    run_originals(python, "score", folder)
    ours = score(case, folder)
    with np.load(folder / "originals.npz") as theirs:
        comparisons = compare(ours, dict(theirs))
    common = {"reward": case.reward, "size": case.size, "parameters": parameters}
    rows = [common | asdict(row) | {"limit": row.limit, "passed": row.passed} for row in comparisons]
    return rows, json.loads((folder / "versions.json").read_text())


def run_originals(python: Path, command: str, folder: Path) -> None:
    """Run the other side; its output is shown if it fails."""
    # Neither this project nor its environment may be seen by the packages, and no hub is asked.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [python, "-W", "ignore", ORIGINALS, command, folder], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"the original packages failed:\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=path_flag, required=True, help="Python of the packages' environment")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", type=path_flag, help="JSON file; its table goes into rewards.md beside it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # without leaving gigabytes behind
    document: dict[str, Any] = {"command": "make parity", "seed": args.seed, "threads": args.threads}
    document["python"] = platform.python_version()
    document["our_versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
    document["rows"] = []
    for case in (Case(r, s, args.seed, args.threads) for s in args.sizes for r in args.rewards):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows, document["their_versions"] = run_case(case, args.python, Path(folder))
        document["rows"] += rows
        worst = max(rows, key=lambda row: row["difference"])
        found = f"largest difference {worst['difference']:.2g} ({worst['quantity']})"
        print(f"{case.reward}, {case.size}: {found}, {time.perf_counter() - start:.0f} s", flush=True)
    print(table(document))
    if args.output:
        write_results(document, args.output, table(document))
    if not all(row["passed"] for row in document["rows"]):
        sys.exit("a difference is larger than its limit, or the numbers hardly vary")


if __name__ == "__main__":
    main()
