"""Write docs/memory.md: what Stable Diffusion 3.5 medium is estimated to need, by resolution and settings.

`python scripts/docs/estimate_table.py` takes about ten minutes on a CPU and reads no weights: the sizes are
those of configs/released/sd35_medium, the rest is configs/sd35_medium.yaml.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import UTILISATION, Estimate, estimate, fits
from am_diffusers.run.plan import make_plan
from am_diffusers.system.gpus import GPUS

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs/memory.md"
CARDS = (24, 48, 80)
TIMED = ("RTX 4090", "L40S", "A100-80GB", "H100")
FULL = "PickScore, HPSv2 held out"
LEAN = "PickScore in bf16, none held out"
REWARDS = {
    FULL: ["--rewards", '[{"name": "pickscore"}]', "--eval_rewards", '[{"name": "hpsv2"}]'],
    LEAN: ["--rewards", '[{"name": "pickscore", "mixed_precision": "bf16"}]', "--eval_prompts", "null"],
}


@dataclass(frozen=True)
class Settings:
    """A row: pixels, micro-batch sizes of rollout, reward and loss, recomputation, rewards."""

    resolution: int
    sizes: tuple[int, int, int]
    checkpointing: bool = True
    rewards: str = FULL

    def estimate(self) -> Estimate:
        """Estimate a process that has the GPU to itself."""
        rollout, reward, loss = map(str, self.sizes)
        flags = {
            "config": str(ROOT / "configs/sd35_medium.yaml"),
            "pretrained_model_name_or_path": str(ROOT / "configs/released/sd35_medium"),
            "resolution": str(self.resolution),
            "train_prompts": "asset:prompts/train.txt",
            "eval_prompts": "asset:prompts/eval.txt",
            "rollout_micro_batch_size": rollout,
            "reward_micro_batch_size": reward,
            "loss_micro_batch_size": loss,
            "eval_batch_size": reward,
            "gradient_checkpointing": str(self.checkpointing).lower(),
            "dry_run": "true",
        }
        options = [token for name, value in flags.items() for token in (f"--{name}", value)]
        without = ["--eval_rewards", "null"] if self.rewards == LEAN else []
        config = parse_config([*options, *without, *REWARDS[self.rewards]])
        return estimate(make_plan(config, 1), Accelerator(cpu=True), on_gpu=True)


ROWS = [
    Settings(512, (1, 1, 1), rewards=LEAN),
    *(Settings(512, sizes) for sizes in ((1, 1, 1), (8, 2, 8), (8, 4, 8), (16, 8, 16), (32, 16, 32))),
    *(Settings(512, sizes, checkpointing=False) for sizes in ((1, 1, 1), (4, 2, 4), (8, 4, 8))),
    Settings(1024, (1, 1, 1), rewards=LEAN),
    *(Settings(1024, sizes) for sizes in ((1, 1, 1), (4, 1, 4), (4, 2, 4), (8, 4, 8))),
    *(Settings(1024, sizes, checkpointing=False) for sizes in ((1, 1, 1), (2, 1, 2))),
]
TEXT = """# Stable Diffusion 3.5 medium: memory, FLOPs and hours, estimated

**Nothing here was run on a GPU or with real weights.** `python scripts/docs/estimate_table.py` made this
file: the run's own classes at their released sizes go through an iteration on tensors without data
(`am_diffusers/estimate`), and every tensor that is held is counted. On a CPU the same estimate is
within 15 % of the growth of a process (`tests/estimate/test_estimate_memory.py`; 2 % off in float32, 9 % in
bfloat16 when this was written). Kernels' workspaces, CUDA's context and fragmentation are not
counted: "fits" means within 90 % of the card. `--dry_run --gpu NAME` prints the same for any
config, by phase and with the setting that lowers the peak. Near the limit set
`PYTORCH_ALLOC_CONF=expandable_segments:True`, which keeps free memory in one piece.

The rest is `configs/sd35_medium.yaml`: 40 samples an iteration, 20 steps, 10 of them trained on,
transformer in bfloat16, LoRA of rank 32, one process on one card. Micro-batches are those of
rollout / reward / loss; grids and evaluation make as many images at a time as a micro-batch of the
reward has. PickScore and HPSv2 are ViT-H/14, in float32 unless said otherwise; a held-out reward stays on
the card from the start. Text encoders are on it before the first iteration only, with transformer
and VAE.
"""


def memory_table(found: dict[Settings, Estimate]) -> list[str]:
    """Return the lines of the table, one per setting."""
    cards = " | ".join(f"{size} GB" for size in CARDS)
    lines = [
        f"| pixels | checkpointing | micro-batches | rewards | peak | in | {cards} |",
        "|" + "---|" * (6 + len(CARDS)),
    ]
    for row, need in found.items():
        sizes = " / ".join(map(str, row.sizes))
        fit = " | ".join("fits" if fits(need, size) else "-" for size in CARDS)
        peak = f"{need.peak / 2**30:.1f} GiB | {need.highest}"
        checkpointing = "on" if row.checkpointing else "off"
        lines.append(f"| {row.resolution} | {checkpointing} | {sizes} | {row.rewards} | {peak} | {fit} |")
    return lines


def time_table(found: dict[Settings, Estimate]) -> list[str]:
    """Return FLOPs and hours of one setting per resolution, with and without recomputation."""
    names = " | ".join(TIMED)
    lines = [
        f"| pixels | checkpointing | PFLOPs an iteration, bf16 + fp32 | {names} |",
        "|" + "---|" * (3 + len(TIMED)),
    ]
    kinds = {(row.resolution, row.checkpointing): need for row, need in found.items() if row.rewards == FULL}
    for (resolution, checkpointing), need in kinds.items():
        flops = need.iteration_flops()
        petas = " + ".join(f"{flops[dtype] / 1e15:.2f}" for dtype in (torch.bfloat16, torch.float32))
        hours = " | ".join(
            " / ".join(f"{need.seconds(name, 1000, allow_tf32=tf32) / 3600:.0f}" for tf32 in (False, True))
            for name in TIMED
        )
        lines.append(f"| {resolution} | {'on' if checkpointing else 'off'} | {petas} | {hours} |")
    return lines


def time_text() -> str:
    """Return the paragraph on what the hours assume."""
    peaks = ", ".join(f"{name} {GPUS[name].bf16:g} / {GPUS[name].fp32:g}" for name in TIMED)
    text = (
        "Hours for 1000 iterations, VAE and rewards in float32 / in TF32 (`allow_tf32`), at an **assumed** "
        f"{UTILISATION:.0%} of the published dense peak (TFLOPS in bfloat16 / float32: {peaks}; NVIDIA's "
        "data sheets). Only matrix products, convolutions and attention are counted, recomputation included, "
        "no row masked."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def main() -> None:
    found = {}
    for row in ROWS:
        found[row] = row.estimate()
        print(row, f"{found[row].peak / 2**30:.1f} GiB in {found[row].highest}", flush=True)
    lines = [
        TEXT,
        "## Memory",
        "",
        *memory_table(found),
        "",
        "## Time",
        "",
        time_text(),
        "",
        *time_table(found),
        "",
    ]
    OUTPUT.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()
