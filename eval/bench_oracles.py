"""Compare each method's law with the tilt, where the tilt is known: mixtures on a line and in the plane.

    python eval/bench_oracles.py                                  every result that is missing, then the page
    python eval/bench_oracles.py --problems five_modes --rows ram --seeds 0
    python eval/bench_oracles.py --render_only                    tables and figure from the committed results

Results are files in eval/benching/data/oracles/, one per row, problem and seed; those with the same settings
are kept. The tables go between the marks in docs/methods.md, the figure to docs/images/oracles.png.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from am_diffusers.system.commands import CommandParser
from am_diffusers.system.files import write_whole
from am_diffusers.system.paths import path_flag
from benching.oracles.figure import write_figure
from benching.oracles.problems import PROBLEMS
from benching.oracles.records import DATA, REFERENCES, Key, ensure
from benching.oracles.tables import SEEDS, render, replace_block
from benching.oracles.variants import VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
ROWS = [*REFERENCES, *VARIANTS]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compute what is missing, write the page."""
    parser = CommandParser(__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--data", type=path_flag, default=DATA, help="folder of the results")
    parser.add_argument("--docs", type=path_flag, default=DOCS, help="folder of methods.md and images/")
    parser.add_argument("--render_only", action="store_true", help="compute nothing")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    torch.set_num_threads(1)  # tensors this small are slower on several, and sums stay the same
    try:
        if not args.render_only:
            run(args)
        page = args.docs / "methods.md"
        text = replace_block(page.read_text("utf-8"), render(args.data))
        write_figure(args.docs / "images" / "oracles.png", args.data)
        write_whole(page, lambda part: part.write_text(text, "utf-8"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Compute what is missing of what was asked for, and say so line by line."""
    keys = [Key(p, row, seed) for seed in args.seeds for p in args.problems for row in args.rows]
    keys = [key for key in keys if key.row != "two_sets" or PROBLEMS[key.problem].dim > 1]
    for number, key in enumerate(keys, 1):
        done = ensure(key, args.data)
        if done != "kept":
            print(f"{number} of {len(keys)}: {key.problem}, {key.row}, seed {key.seed}: {done}", flush=True)


if __name__ == "__main__":
    main()
