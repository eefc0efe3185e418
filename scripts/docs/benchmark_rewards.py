"""Measure each reward's forward and backward pass for one image, in time, memory and arithmetic.

    python scripts/docs/benchmark_rewards.py [NAME ...] [--threads N]

The released architectures run at full size with random weights; text features of CLIP-type rewards are
remembered per prompt and not counted. Every reward is measured in a process of its own, so that no other one
counts in its peak memory. "CPU s" sums over threads and leaves out other work. The GPU column is
arithmetic, not a measurement.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from am_diffusers.rewards import OCR, Aesthetic, HPSv2, ImageNetClass, ImageReward, LearnedReward, PickScore
from am_diffusers.rewards.image_reward import MARKS
from am_diffusers.rewards.parts.blip import RELEASED, BlipScorer
from am_diffusers.rewards.parts.heads import AffineHead
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat
from am_diffusers.system.files import asset_path

REPEATS = 3
GPU, GPU_FLOPS = "H100, bf16 at 40 %", 0.4 * 989e12
PROMPT = 'a red fox with the sign "FOX"'  # an ImageNet class, and a quoted text


def vit_h() -> LearnedReward:
    """Make HPSv2; PickScore and HPSv2.1 are the same network."""
    config = open_clip.get_model_config("ViT-H-14")
    assert config is not None
    pixel_format = PixelFormat(config["vision_cfg"]["image_size"], CLIP_MEAN, CLIP_STD)
    return HPSv2(CLIP(**config), tokenizer=SimpleTokenizer(), pixel_format=pixel_format)


def vit_l() -> LearnedReward:
    """Make the aesthetic predictor; CLIPScore is the same network."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "projection_dim": 768}
    head = AffineHead(torch.ones(768, dtype=torch.float64), 0.0)
    return Aesthetic(CLIPModel(CLIPConfig(vision_config=vision, projection_dim=768)), head=head)


def blip() -> LearnedReward:
    """Make ImageReward, with a made-up vocabulary of BERT's size."""
    vocab = {token: row for row, token in enumerate(MARKS)}
    vocab |= {f"word{row}": row for row in range(len(MARKS), RELEASED.text_config["vocab_size"] - 2)}
    return ImageReward(BlipScorer(RELEASED), config=RELEASED, tokenizer=BertTokenizer(vocab=vocab))


# Name -> reward and side of the square image that it scores.
REWARDS: dict[str, tuple[Callable[[], LearnedReward], int]] = {
    "hpsv2, pickscore (ViT-H/14)": (vit_h, 512),
    "aesthetic, clip_score (ViT-L/14)": (vit_l, 512),
    "image_reward (BLIP-L)": (blip, 512),
    "ocr (PP-OCRv4)": (OCR.from_pretrained, 48),
    "imagenet_class (EfficientNet-Lite0)": (ImageNetClass.from_pretrained, 512),
    "embedded pickscore": (lambda: PickScore.from_pretrained(asset_path("asset:tiny_pickscore")), 64),
    "embedded hpsv2": (lambda: HPSv2.from_pretrained(asset_path("asset:tiny_hpsv2")), 64),
}


def measure(name: str, threads: int) -> dict[str, float]:
    """Measure seconds, bytes and floating-point operations of one image's forward and backward pass."""
    torch.set_num_threads(threads)
    # Gradients of untrained networks are so small that a processor computes with them five times slower.
    torch.set_flush_denormal(True)
    build, side = REWARDS[name]
    reward = build()
    images = torch.rand(1, 3, side, side, requires_grad=True)

    def run() -> None:
        torch.autograd.grad(reward(images, [PROMPT]).sum(), images)

    reward(images.detach(), [PROMPT])  # text features are remembered from here on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "weights_and_runtime_mb": before / 1024,
        "passes_mb": (peak - before) / 1024,
        "flops": counter.get_total_flops(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"rewards of {list(REWARDS)}; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="measure one reward in this process")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.names[0], args.threads)))
        return
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    print(f"| reward | s ({threads}) | CPU s | MB before | MB more | GFLOP | ms ({GPU}) |")
    print("|---|---|---|---|---|---|---|")
    for name in args.names or REWARDS:
        command = [sys.executable, __file__, name, "--json", "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {name} | {row['seconds']:.3g} | {row['cpu_seconds']:.3g}"
            f" | {row['weights_and_runtime_mb']:.0f} | {row['passes_mb']:.0f}"
            f" | {row['flops'] / 1e9:.3g} | {1e3 * row['flops'] / GPU_FLOPS:.2g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
