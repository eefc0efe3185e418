"""Compare samplers of energies, three seeds each, with settings declared here; records and a table.

    python eval/bench_samplers.py                                       what is missing, then the table
    python eval/bench_samplers.py --laws many_well --samplers naas --seeds 0
    python eval/bench_samplers.py --render_only

Each run is `scripts/sample_energy.py` in a process of its own. Records are report.json files in
eval/benching/data/samplers/; the table goes between the marks in docs/samplers.md.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from am_diffusers.samplers import SAMPLERS
from am_diffusers.system.files import write_text
from am_diffusers.system.paths import path_flag
from am_diffusers.system.text import replace_table
from benching.samplers import DATA, LAWS, SEEDS, Key, ensure, render

PAGE = Path(__file__).parent.parent / "docs" / "samplers.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compute what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--data", type=path_flag, default=DATA, help="folder of the records")
    parser.add_argument("--work", type=path_flag, default=Path("outputs/bench_samplers"), help="run folders")
    parser.add_argument("--page", type=path_flag, default=PAGE, help="page with the table's marks")
    parser.add_argument("--render_only", action="store_true", help="compute nothing")
    args = parser.parse_args(argv)
    try:
        runs = itertools.product(args.seeds, args.laws, args.samplers)
        for key in () if args.render_only else [Key(law, sampler, seed) for seed, law, sampler in runs]:
            print(f"{key.name}: {ensure(key, args.data, args.work)}", flush=True)
        page = replace_table(args.page.read_text("utf-8"), "samplers", render(args.data))
        write_text(args.page, page)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
