"""Every method through the finetune script: a run of one process, and two real processes against one."""

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from am_diffusers.methods import METHODS
from finetune_runs import FINETUNE, read_metrics, tiny_config, write_rewards

OWN = {
    "adjoint_matching": {},
    "buffered_adjoint_matching": {"buffer_size": 8, "buffer_refresh": 2},
    "deterministic_adjoint_matching": {"truncate_steps": 3},
    "draft": {"draft_steps": 2},
    "efficient_adjoint_matching": {"num_inference_steps": 20, "eam_ode_steps": 3, "eam_rows": 2},
    "flow_grpo": {"samples_per_prompt": 2, "grpo_passes": 2},
    "ram": {"samples_per_prompt": 2},
    "refl": {"refl_last_steps": 3},
    "reward_weighted_matching": {"samples_per_prompt": 2, "rwm_noises": 2},
}
WITH_TWO_PROCESSES = [name for name in OWN if name != "adjoint_matching"]  # in test_scripts.py
SHORT = {
    "eval_prompts": None,
    "eval_rewards": None,
    "max_train_steps": 2,
    "num_validation_prompts": 1,
    "num_validation_images": 1,
    "validation_prompts": ["a red fox"],
    "report_to": "none",
}


@pytest.mark.parametrize("name", METHODS)
def test_the_script_runs_every_method(tiny_sd3_dir, tmp_path, monkeypatch, capsys, name):
    changes = {"method": name, "rewards": [{"name": "brightness"}]} | SHORT | OWN[name]
    config = tiny_config(tiny_sd3_dir, tmp_path, **changes)
    monkeypatch.setattr(sys, "argv", [str(FINETUNE), "--config", str(config)])
    runpy.run_path(str(FINETUNE), run_name="__main__")
    assert "finished: LoRA, metrics and images are in" in capsys.readouterr().out
    output = tmp_path / "out"
    lines = read_metrics(output)
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    lora = load_file(output / "pytorch_lora_weights.safetensors")
    assert max(value.abs().max() for key, value in lora.items() if "lora_B" in key) > 0
    assert yaml.safe_load((output / "config.yaml").read_text())["method"] == name
    assert (output / "checkpoint-000002").is_dir()


@pytest.fixture(scope="module")
def joined(tiny_sd3_dir, tmp_path_factory) -> Path:
    """Runs of each method by one process, in NAME/one, and by two real ones, in NAME/out."""
    folder = tmp_path_factory.mktemp("joined")
    write_rewards(folder)
    pickscore = [{"name": "pickscore", "model": str(folder / "pickscore")}]
    configs = []
    for name in WITH_TWO_PROCESSES:
        (folder / name).mkdir()
        changes = {"method": name, "rewards": pickscore, "train_batch_size": 8, "learning_rate": 3e-4}
        configs.append(str(tiny_config(tiny_sd3_dir, folder / name, **(changes | SHORT | OWN[name]))))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    worker = Path(__file__).parents[1] / "joined_runs.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(worker), *configs],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes: 2, device: cpu") == len(configs)
    with pytest.MonkeyPatch.context() as patched:
        for config in configs:
            output = Path(config).parent / "one"
            patched.setattr(sys, "argv", [str(FINETUNE), "--config", config, "--output_dir", str(output)])
            runpy.run_path(str(FINETUNE), run_name="__main__")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TWO_PROCESSES)
def test_two_real_processes_give_the_losses_of_one(joined, name):
    """Equivalence of runs, to 1e-5: sums in another order, and batches of other sizes."""
    one, two = (read_metrics(joined / name / output) for output in ("one", "out"))
    assert len(one) == len(two) == 2
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for alone, shared in zip(one, two, strict=True):
        for key in alone.keys() - {"seconds", "grad_norm"}:
            assert shared[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-6), key
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert alone["grad_norm"] > 0
