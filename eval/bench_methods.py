"""Run the benchmarks of methods in eval/benching that are missing, then write docs/methods.md.

    OMP_NUM_THREADS=1 python eval/bench_methods.py [methods] [discretisation]

A study's settings, budgets and seeds are declared in eval/benching/STUDY.yaml. Every run leaves a record in
eval/benching/data/STUDY, which is committed, and is skipped when the record is there. Methods are
compared by the processor's time that they take: the machine may do other work beside. On N cores N of these
programs can share the work, each with one thread; every run is done by one of them.
"""

import sys
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from am_diffusers.system.commands import CommandParser
from am_diffusers.system.paths import path_flag
from am_diffusers.system.text import suggest
from benching.images.page import write_page
from benching.images.work import Work

DOCS = Path(__file__).parents[1] / "docs"
STUDIES = ("methods", "discretisation")


def main() -> None:
    """Run what is missing."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    parser = CommandParser(__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all, {', '.join(STUDIES)}")
    parser.add_argument(
        "--output_dir", type=path_flag, default=Path("outputs/benchmarks"), help="folder of LoRAs and images"
    )
    parser.add_argument("--tables_only", action="store_true", help="train nothing, write tables and figures")
    options = parser.parse_args()
    try:
        for name in options.studies:
            if name not in STUDIES:
                raise ValueError(f"no study {suggest(name, STUDIES)}")
        for name in options.studies or STUDIES:
            work = Work.of(name, options.output_dir)
            while not options.tables_only and (done := work.do_next()) is not None:
                print(f"{name}: {done}", flush=True)
        for name in STUDIES:  # one may refer to another
            write_page(name, Work.of(name, options.output_dir), DOCS)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
