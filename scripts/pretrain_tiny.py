"""Train the embedded pipeline and its rewards from emoji art, stage by stage, each resumable.

    python scripts/pretrain_tiny.py pictures vae decoder text transformer --work_dir outputs/pretrain
    python scripts/pretrain_tiny.py pickscore_towers hpsv2_towers generated pickscore hpsv2 image_reward
    python scripts/pretrain_tiny.py export measure

Each stage reads what the stages before it left in `work_dir` and takes up to an hour on two cores. `export`
copies the results into `am_diffusers/assets`; `measure` writes the figures of the model cards there. Seeds
are fixed; weights depend on the machine's arithmetic.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from pretrain.data import PictureSet
from pretrain.export import export
from pretrain.matching_reward import train_image_reward
from pretrain.measure import measure
from pretrain.pictures import build
from pretrain.preferences import save_generated, train_preferences
from pretrain.text import train_text
from pretrain.towers import train_towers
from pretrain.transformer import train_transformer
from pretrain.vae import train_decoder, train_vae

ASSETS = Path(__file__).parent.parent / "am_diffusers" / "assets"
PICTURES = ASSETS / "pictures" / "pictures.parquet"

Stage = Callable[[Path, int], object]
# Stage name -> (what it does, the published number of optimizer steps or pictures)
STAGES: dict[str, tuple[Stage, int]] = {
    "pictures": (lambda folder, _: build(PICTURES, folder / "npm"), 0),
    "vae": (lambda folder, steps: train_vae(PictureSet(PICTURES), folder, steps), 1700),
    "decoder": (lambda folder, steps: train_decoder(PictureSet(PICTURES), folder, steps), 500),
    "text": (lambda folder, steps: train_text(PictureSet(PICTURES), folder, steps), 400),
    "transformer": (lambda folder, steps: train_transformer(PictureSet(PICTURES), folder, steps), 10000),
    "pickscore_towers": (lambda folder, n: train_towers(PictureSet(PICTURES), folder, "pickscore", n), 350),
    "hpsv2_towers": (lambda folder, n: train_towers(PictureSet(PICTURES), folder, "hpsv2", n), 350),
    "generated": (lambda folder, number: save_generated(PictureSet(PICTURES), folder, number), 2560),
    "pickscore": (lambda folder, n: train_preferences(PictureSet(PICTURES), folder, "pickscore", n), 2000),
    "hpsv2": (lambda folder, n: train_preferences(PictureSet(PICTURES), folder, "hpsv2", n), 1040),
    "image_reward": (lambda folder, n: train_image_reward(PictureSet(PICTURES), folder, n), 4000),
    "export": (lambda folder, _: export(PictureSet(PICTURES), folder, ASSETS), 0),
    "measure": (lambda folder, _: measure(PictureSet(PICTURES), folder, ASSETS), 0),
}


def main() -> None:
    """Run the named stages in order."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pretrain"))
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the published number")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        stage, published = STAGES[name]
        stage(args.work_dir, args.steps or published)


if __name__ == "__main__":
    main()
