"""Turn a published pickle of a reward into a safetensors folder, once, after comparing its sha256.

    python scripts/convert_reward.py image_reward ImageReward.pt models/image_reward --sha256 H

The folder then goes into `model:` of a reward in the config, and scores as the pickle does.
"""

import argparse
import sys

from am_diffusers.rewards import REWARDS, LearnedReward
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.paths import path_flag, place_flag

LEARNED = {name: kind for name, kind in REWARDS.items() if issubclass(kind, LearnedReward)}


def main() -> None:
    options = parse()
    try:
        LEARNED[options.name].convert(options.file, options.folder, options.sha256)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.name}: {options.folder.resolve()}")


def parse() -> argparse.Namespace:
    parser = CommandParser("Turn a published pickle of a reward into safetensors.")
    parser.add_argument("name", choices=LEARNED, help="name of the reward")
    parser.add_argument(
        "file", type=place_flag, help="the published file, or owner/repository/file on the hub"
    )
    parser.add_argument("folder", type=path_flag, help="folder to write; other files in it stay")
    parser.add_argument("--sha256", help="sha256 of the file; none = the pinned one, or it is only logged")
    return parser.parse_args()


if __name__ == "__main__":
    main()
