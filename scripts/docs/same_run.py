"""Compare the runs of two checkouts: a refactor keeps every number and every bit of the LoRA.

    git worktree add ../before main
    python scripts/docs/same_run.py ../before . --work_dir outputs/same_run

Each case is a short run of `scripts/finetune.py` in both checkouts. Compared are `metrics.jsonl` (without
seconds) and the tensors of the LoRA; then the second checkout resumes the first one's checkpoint from the
middle of the run and must end with the same. Finished runs of the first checkout are kept in
`--work_dir` and not run again, so that one reference serves many steps. The exit status is the
number of cases that differ.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from am_diffusers.system.paths import path_flag

DEMO = "demo"
LORA = "pytorch_lora_weights.safetensors"
TIMES = ("seconds", "second")  # parts of the names of values that differ from run to run


def main() -> None:
    options = parse()
    cases = options.cases or [DEMO, *sorted(file.stem for file in methods_folder(options.after).iterdir())]
    different = sum(not same_case(options, case) for case in cases)
    print(f"{len(cases) - different} of {len(cases)} cases are equal")
    sys.exit(different)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=path_flag, help="checkout whose results are the reference")
    parser.add_argument("after", type=path_flag, help="checkout that must give the same")
    parser.add_argument(
        "--work_dir", type=path_flag, default=Path("outputs/same_run"), help="folder of the runs"
    )
    parser.add_argument("--cases", nargs="*", help="demo, or names in configs/methods; default: all of them")
    parser.add_argument("--iterations", type=int, default=20, help="iterations of the demo; methods run 4")
    return parser.parse_args()


def methods_folder(checkout: Path) -> Path:
    return checkout / "configs" / "methods"


def same_case(options: argparse.Namespace, case: str) -> bool:
    """Run a case in both checkouts, resume the first one's checkpoint in the second, print what differs."""
    iterations = options.iterations if case == DEMO else 4
    before, after, resumed = (options.work_dir / case / name for name in ("before", "after", "resumed"))
    for folder in (after, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    if not (before / LORA).exists():
        finetune(options.before, before, case, iterations)
    finetune(options.after, after, case, iterations)
    half = f"checkpoint-{iterations // 2:06}"
    resumed.mkdir(parents=True)
    shutil.copytree(before / half, resumed / half)
    finetune(options.after, resumed, case, iterations)
    found = [
        *differences(before, after, "run"),
        *([] if digest(before) == digest(resumed) else ["resumed: the LoRA differs"]),
    ]
    print(f"{case}: {'; '.join(found) or 'equal'}", flush=True)
    return not found


def finetune(checkout: Path, folder: Path, case: str, iterations: int) -> None:
    """Run `scripts/finetune.py` of a checkout on one thread, a few small evaluations included."""
    checkout = checkout.resolve()
    words = [sys.executable, "scripts/finetune.py", "--config", "configs/tiny_sd3.yaml"]
    if case != DEMO:
        words += ["--config", f"configs/methods/{case}.yaml"]
    words += [f"--output_dir={folder.resolve()}", f"--max_train_steps={iterations}"]
    words += [f"--checkpointing_steps={iterations // 2}", "--checkpoints_total_limit=null"]
    words += [
        f"--validation_steps={iterations // 2}",
        "--eval_images_per_prompt=2",
        "--eval_inference_steps=4",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(
            f"{checkout}, {case}: exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        )


def differences(before: Path, after: Path, name: str) -> list[str]:
    """Name what differs between two finished runs."""
    ours, theirs = metrics(after), metrics(before)
    found = [] if digest(before) == digest(after) else [f"{name}: the LoRA differs"]
    if len(ours) != len(theirs):
        found.append(f"{name}: {len(theirs)} lines of metrics before, {len(ours)} after")
    for number, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            first = keys[0]
            found.append(
                f"{name}: line {number} of metrics differs in {', '.join(keys)}: {a.get(first)!r} "
                f"before, {b.get(first)!r} after"
            )
            break
    return found


def metrics(folder: Path) -> list[dict[str, object]]:
    """Read `metrics.jsonl` without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]


def digest(folder: Path) -> str:
    """Hash the tensors of the LoRA file; its header is written in an order that varies from run to run."""
    with safe_open(folder / LORA, "pt") as file:
        names = sorted(file.keys())
        tensors = b"".join(file.get_tensor(name).numpy().tobytes() for name in names)
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    words = json.dumps([names, {k: sorted(v) if isinstance(v, list) else v for k, v in adapter.items()}])
    return hashlib.sha256(words.encode() + tensors).hexdigest()


if __name__ == "__main__":
    main()
