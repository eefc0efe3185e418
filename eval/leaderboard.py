"""One table of all evaluations in a folder, sorted by the gain in a reward.

    python eval/leaderboard.py outputs --sort_by hpsv2 --html leaderboard.html

It takes every summary.json below the folder. Evaluations with other prompts, images per prompt, base,
sampler, seed or reward weights come in tables of their own: their numbers can't be compared.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from am_diffusers.system.commands import CommandParser
from am_diffusers.system.files import write_text
from am_diffusers.system.paths import path_flag
from am_diffusers.system.text import guard_output
from evaluating.tables.leaderboard import choose_reward, find_evaluations, leaderboard_tables, to_rows
from evaluating.tables.renderings import to_latex, to_markdown, to_page
from evaluating.tables.tables import to_csv


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, print the tables, write the files."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "folder", type=path_flag, help="folder with output folders of evaluate.py, at any depth"
    )
    parser.add_argument("--sort_by", help="reward whose gain sorts; default: the first one")
    parser.add_argument("--csv", type=path_flag, help="file for every comparison, also by category, in full")
    parser.add_argument("--html", type=path_flag, help="file for the tables as a web page")
    parser.add_argument(
        "--tex", type=path_flag, help="file for the tables in LaTeX, for the package booktabs"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    guard_output()
    try:
        show(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def show(args: argparse.Namespace) -> None:
    """Print the tables and write those files that were asked for."""
    evaluations = find_evaluations(args.folder)
    tables = leaderboard_tables(evaluations, choose_reward(evaluations, args.sort_by))
    print("\n".join(map(to_markdown, tables)))
    if args.csv:
        write_text(args.csv, to_csv(to_rows(evaluations)))
    if args.html:
        write_text(args.html, to_page(tables, "Leaderboard"))
    if args.tex:
        write_text(args.tex, "\n".join(map(to_latex, tables)))


if __name__ == "__main__":
    main()
