"""Turn a published pickle of a reward into a safetensors folder, once, after comparing its sha256.

    python scripts/convert_reward.py image_reward ImageReward.pt models/image_reward --sha256 H

The folder then goes into `model:` of a reward in the config, and scores as the pickle does.
"""

import argparse
import sys
from pathlib import Path

from am_diffusers.rewards import aesthetic, hpsv2, image_reward

CONVERTERS = {
    "hpsv2": hpsv2.convert_released,
    "image_reward": image_reward.convert_released,
    "aesthetic": aesthetic.convert_released,
}


def main() -> None:
    options = parse()
    try:
        CONVERTERS[options.name](options.file, options.folder, options.sha256)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.name}: {options.folder.resolve()}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn a published pickle of a reward into safetensors.")
    parser.add_argument("name", choices=CONVERTERS, help="reward to convert")
    parser.add_argument("file", help="the published file, or owner/repository/file on the hub")
    parser.add_argument("folder", type=Path, help="folder to write; other files in it stay")
    parser.add_argument("--sha256", help="checksum of the file; none = the pinned one, or it is only logged")
    return parser.parse_args()


if __name__ == "__main__":
    main()
