"""Learn to sample a law known by its energy: Adjoint Sampling, the Schroedinger bridge sampler, annealing.

For example `python scripts/sample_energy.py --energy gmm40 --dimension 2 --sampler naas`. Writes
samples.safetensors (with log weights of their paths), metrics.jsonl, report.md, report.json and samples.png.
The same command again resumes a run that was stopped or killed. `--energy module:Class` samples a law of your
own, see docs/samplers.md.
"""

import argparse
import sys
from pathlib import Path

from am_diffusers.samplers import SAMPLERS
from am_diffusers.samplers.command import add_settings, plan_of
from am_diffusers.samplers.energies import ENERGIES
from am_diffusers.system.paths import path_flag
from am_diffusers.system.ranges import COUNT, SEED
from am_diffusers.system.signals import Interrupted, StopSignal


def main() -> None:
    try:
        plan = plan_of(parse())
    except ValueError as error:
        sys.exit(f"error: {error}")
    stop = StopSignal()
    try:
        with stop.listening():
            for line in plan.run(stop):
                print(line, flush=True)
    except Interrupted as interrupted:
        print(f"{interrupted}: run the same command again to resume")
        sys.exit(128 + interrupted.number)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--energy", required=True, help=f"{', '.join(ENERGIES)}, or module:Class")
    parser.add_argument("--dimension", type=COUNT.read, help="of the law; none = its own")
    parser.add_argument("--sampler", choices=SAMPLERS, required=True, help="how to learn it")
    parser.add_argument("--output_dir", type=path_flag, default=Path("outputs/energy"), help="result folder")
    parser.add_argument("--num_samples", type=COUNT.read, default=2000, help="samples drawn in the end")
    parser.add_argument("--seed", type=SEED.read, default=0, help="seed of weights and noise")
    parser.add_argument(
        "--checkpointing_steps", type=COUNT.read, default=100, help="iterations between checkpoints"
    )
    add_settings(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
