"""Train the embedded pipeline, its judge and its rewards from emoji art, stage by stage, each resumable.

    python scripts/assets/pretrain_tiny.py sprites vae text transformer --work_dir outputs/world
    python scripts/assets/pretrain_tiny.py judge samples generated pickscore hpsv2 image_reward rewards export

Each stage reads what the stages before it left in `work_dir`, saves its state there every three minutes and
goes on from it when it is run again. Seeds are fixed; weights depend on the machine's arithmetic. `samples`
may be run at any time to see what the transformer draws so far. On a card add `--device cuda`: all steps
are then of eight times as many images, and there are an eighth as many.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from pretrain.export import export
from pretrain.judge import train_judge
from pretrain.loop import Loop
from pretrain.matching_reward import train_image_reward
from pretrain.measure import measure_rewards, save_samples
from pretrain.preferences import save_generated
from pretrain.sprites import build_sprites
from pretrain.text import train_text
from pretrain.towers import train_towers
from pretrain.transformer import train_transformer
from pretrain.vae import train_vae
from pretrain.world import World

from am_diffusers.system.paths import path_flag

LARGER = 8  # a card's batches

Stage = Callable[[World, Loop], object]
# Stage name -> (what it does, steps or batches, images each)
STAGES: dict[str, tuple[Stage, int, int]] = {
    "vae": (train_vae, 1100, 16),
    "text": (train_text, 300, 96),
    "transformer": (train_transformer, 12000, 64),
    "judge": (train_judge, 160, 64),
    "samples": (save_samples, 4, 64),
    "generated": (save_generated, 32, 64),
    "pickscore": (lambda world, loop: train_towers(world, loop, "pickscore"), 1500, 64),
    "hpsv2": (lambda world, loop: train_towers(world, loop, "hpsv2"), 1500, 64),
    "image_reward": (train_image_reward, 2500, 64),
    "rewards": (measure_rewards, 1, 1),
    "export": (export, 1, 1),
}


def main() -> None:
    """Run the named stages in order."""
    args = parse()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sprites = args.work_dir / "sprites.parquet"
    for name in args.stages:
        if name == "sprites":
            build_sprites(sprites, args.work_dir / "npm")
            continue
        stage, steps, batch = STAGES[name]
        factor = LARGER if args.device.type == "cuda" else 1
        loop = Loop(args.work_dir, args.steps or max(1, steps // factor), batch * factor, args.device)
        result = stage(World(sprites), loop)
        if result is not None:
            print(json.dumps({"stage": name} | result, indent=1))


def parse() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="+", choices=["sprites", *STAGES])
    parser.add_argument("--work_dir", type=path_flag, default=Path("outputs/world"))
    parser.add_argument("--steps", type=int, help="steps or batches instead of the published number")
    parser.add_argument("--threads", type=int, default=1, help="bfloat16 is fastest on one on most CPUs")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
