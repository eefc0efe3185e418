"""Draw the curves of a running or finished run again: `python scripts/plot_run.py outputs/mine`."""

import sys

from am_diffusers.evaluation.panel import draw_panel
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.paths import path_flag


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("output_dir", type=path_flag, help="output folder of scripts/finetune.py")
    try:
        print(draw_panel(parser.parse_args().output_dir))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
