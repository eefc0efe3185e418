import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.grids import to_pil
from am_diffusers.evaluation.images import image_ids
from am_diffusers.evaluation.scores import load_scores
from am_diffusers.models.base import Model
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import read_lines
from finetune_runs import FINETUNE, read_metrics, tiny_config, write_rewards

SCRIPTS = FINETUNE.parent
CONFIGS = sorted((SCRIPTS.parent / "configs").glob("*.yaml"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reward models, prompts and outputs of one finished run with 10 iterations."""
    folder = tmp_path_factory.mktemp("run")
    write_rewards(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tiny_sd3_dir):
    """Standard output of `python scripts/finetune.py`, called in another directory."""
    config = tiny_config(tiny_sd3_dir, folder, max_train_steps=10, learning_rate=0.01)
    command = [sys.executable, str(FINETUNE), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(monkeypatch, name, *flags):
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_calibration_writes_a_config_that_standardises_base_scores(
    tiny_sd3_dir, folder, tmp_path, monkeypatch, capsys
):
    write_rewards(tmp_path)
    rewards = [
        {"name": "pickscore", "model": str(tmp_path / "pickscore"), "weight": 0.5},
        {"name": "brightness"},
    ]
    config = tiny_config(tiny_sd3_dir, tmp_path, rewards=rewards)
    flags = ["--config", config, "--output", tmp_path / "rewards.yaml", "--num_prompts", 2]
    run_script(monkeypatch, "calibrate_rewards.py", *flags, "--images_per_prompt", 8)
    printed = capsys.readouterr().out
    assert "pickscore: mean" in printed
    assert "gains of tilts of the base in base sd, told by 2 prompts x 8 images:" in printed
    assert "weighted sum  pickscore (trained)  brightness (trained)  hpsv2" in printed
    first = parse_config(["--config", str(config), "--config", str(tmp_path / "rewards.yaml")]).method.rewards
    assert [(reward.name, reward.weight) for reward in first] == [("pickscore", 0.5), ("brightness", 1.0)]
    assert first[0].model == rewards[0]["model"]
    accelerator = make_accelerator(parse_config(["--config", str(config)]))
    calibrated = parse_config(["--config", str(config), "--config", str(tmp_path / "rewards.yaml")])
    plan = make_plan(calibrated, 1)
    run = build(plan, accelerator)
    certifier = run.trainer.hooks.validate.certify
    sampler = dataclasses.replace(certifier.sampler, purpose="calibration")
    prompts = plan.some_train_prompts(2, "calibration")
    assert len(set(prompts)) == 2
    images = sampler.images(certifier.base, prompts, image_ids(2, 8))
    brightness = images.flatten(1).mean(1).double()
    assert (first[1].mean, first[1].std) == pytest.approx((brightness.mean().item(), brightness.std().item()))
    assert load_scores(Path(calibrated.evaluation.frontier), prompts)["brightness"].shape == (2, 8)


def test_finetune_ends_with_gains_diversity_and_certificate(finished, folder):
    lines = finished.strip().splitlines()
    assert lines[0].startswith("processes: 1, device: cpu")
    starts = ["finished: ", "trained reward pickscore: ", "held-out reward hpsv2: ", "diversity kept (hpsv2"]
    (first,) = (number for number, line in enumerate(lines) if line.startswith("finished: "))
    last = lines[first:]
    assert [line.startswith(start) for line, start in zip(last, starts, strict=False)] == [True] * 4
    certificate = json.loads((folder / "out/evaluation.json").read_text())["certificate"]
    assert f"path KL: {certificate['path_kl']['value']:.2f} nats" in "\n".join(last)
    for name in ("pickscore", "hpsv2"):
        assert any(line.startswith(f"{name} by the chain of training: ") for line in last)
        assert (
            certificate["outcomes"][name]["tuned"]["value"] != certificate["outcomes"][name]["base"]["value"]
        )
    written = {path.name for path in (folder / "out").iterdir()}
    assert written >= {"pytorch_lora_weights.safetensors", "config.yaml", "metrics.jsonl", "evaluation.json"}
    (events,) = (folder / "out/logs").rglob("events.out.tfevents*")
    scalars = EventAccumulator(str(events)).Reload()
    logged = [event.value for event in scalars.Scalars("loss")]
    assert logged == pytest.approx([line["loss"] for line in read_metrics(folder / "out")])
    assert [image.step for image in scalars.Images("validation/panel")][-1] == 10
    assert [event.step for event in scalars.Scalars("validation/hpsv2_gain")] == [0, 2, 4, 6, 8, 10]


def test_two_processes_give_the_losses_of_one(folder, tiny_sd3_dir, tmp_path):
    """Same total batch, float32, the published settings; the mask drops rows, unequally many."""
    rewards = {"rewards": [{"name": "pickscore", "model": str(folder / "pickscore")}], "eval_rewards": None}
    config = tiny_config(
        tiny_sd3_dir,
        tmp_path,
        **rewards,
        eval_prompts=None,
        learning_rate=3e-4,
        max_train_steps=10,
        mask_quantile=0.9,
        tail_samples=1,
    )
    one = make_run_in_process(config)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--main_process_port", "0", FINETUNE, "--config", config, "--output_dir", tmp_path / "two"]
    done = subprocess.run([*launch, *map(str, options)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    # `accelerate launch --cpu --num_processes 2` starts one process: the count is part of the test.
    assert "processes: 2, device: cpu" in done.stdout
    two = read_metrics(tmp_path / "two")
    shared, alone = (read_lines(tmp_path / out / "validation.jsonl") for out in ("two", "out"))
    assert [line.keys() for line in shared] == [line.keys() for line in alone]
    # Published scores are of 8-bit pictures: 1e-6 that rounds to another level moves them by 1e-4.
    for name in ("iteration", "validation/pickscore", "validation/pickscore_base"):
        of_one, of_two = ([line[name] for line in lines] for lines in (alone, shared))
        assert of_two == pytest.approx(of_one, rel=1e-3), name
    assert len(one) == len(two) == 10
    assert len({line["masked"] for line in one}) > 2
    for name in ("loss", "reward", "reward_std", "path_kl", "masked"):
        of_one, of_two = ([line[name] for line in lines] for lines in (one, two))
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=1e-6), name
    assert [line["grad_norm"] for line in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-4)


def make_run_in_process(path):
    """Metrics of all iterations of a config, in this process."""
    config = parse_config(["--config", str(path), "--report_to", "none"])
    accelerator = make_accelerator(config)
    assert accelerator.num_processes == 1
    build(make_plan(config, 1), accelerator).trainer.train()
    return read_metrics(Path(config.run.output_dir))


def test_lora_in_plain_diffusers_gives_the_grid_picture(finished, folder, tiny_sd3_dir):
    """The five lines of a user, with the seed that stands beside the grid."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir, text_encoder_3=None, tokenizer_3=None)
    listed = yaml.safe_load((folder / "out/samples/pictures.json").read_text())
    picture = listed["pictures"][3]
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "pt"}

    def render():
        generator = torch.Generator().manual_seed(picture["seed"])
        call_size = {"height": 64, "width": 64, "generator": generator}
        return np.asarray(to_pil(pipe(listed["prompts"][picture["prompt"]], **call, **call_size).images[0]))

    base = render()
    pipe.load_lora_weights(str(folder / "out"))
    tuned = render()
    assert np.abs(tuned.astype(int) - base).max() > 10
    grid = np.asarray(Image.open(folder / "out/samples/iteration-000010.png"))
    for column, expected in (("base", base), ("tuned", tuned)):
        cell = cut_cell(grid, row=picture["prompt"], column=2 * picture["image"] + (column == "tuned"))
        assert np.abs(cell.astype(int) - expected).max() <= 1, column


def cut_cell(grid, row, column):
    """A 64-pixel picture of a grid, where it is drawn at twice the size."""
    top, left = 16 + 6 + row * (16 + 128 + 16 + 6) + 16, 6 + column * (128 + 6)
    return grid[top : top + 128 : 2, left : left + 128 : 2]


def test_sample_renders_base_and_lora(finished, folder, tiny_sd3_dir, tmp_path, monkeypatch):
    sizes = ["--resolution", 64, "--max_sequence_length", 8, "--num_inference_steps", 3]
    common = ["--model", tiny_sd3_dir, "--prompts", "a fox", "red", "--num_images", 2, "--seed", 5, *sizes]
    run_script(monkeypatch, "sample.py", *common, "--output", tmp_path / "base")
    run_script(monkeypatch, "sample.py", *common, "--output", tmp_path / "lora", "--lora", folder / "out")
    off = ["--lora", folder / "out", "--lora_scale", 0]
    run_script(monkeypatch, "sample.py", *common, "--output", tmp_path / "off", *off)
    names = ["0000-seed5.png", "0000-seed6.png", "0001-seed5.png", "0001-seed6.png", "grid.png"]
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == names
    base, lora, none = (
        np.asarray(Image.open(tmp_path / name / "0000-seed5.png")).astype(int)
        for name in ("base", "lora", "off")
    )
    assert np.abs(lora - base).max() > 10
    assert np.abs(none - base).max() <= 1


def test_benchmark_prints_the_breakdown(folder, tiny_sd3_dir, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_sd3_dir, folder)
    run_script(monkeypatch, "docs/benchmark_iteration.py", "--config", config)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "median of 7",
        "policy, forward (rollout)",
        "base, forward and backward (adjoint)",
        "base, forward (step 0)",
        "VAE and reward, forward and backward",
        "policy, forward and backward (loss)",
        "all bare passes",
        "iteration",
        "iteration / bare passes",
    ]


BAD_INPUT = {
    "unknown key": ({"lerning_rate": 1}, [], "'lerning_rate': did you mean 'learning_rate'"),
    "unknown flag": ({}, ["--reward_scal", "2"], "'reward_scal': did you mean 'reward_scale'"),
    "no model": ({"pretrained_model_name_or_path": "/nowhere/model"}, [], "cannot load the model /nowhere"),
    "hub model": ({"pretrained_model_name_or_path": "owner/model"}, [], "hf download owner/model"),
    "size": ({"resolution": 60}, [], "60 is not a multiple of 8 pixels: use 56 or 64"),
    "steps": ({"num_inference_steps": 1}, [], "--num_inference_steps must be from 2 to 1000"),
    "gradient": ({"rewards": [{"name": "jpeg_size"}]}, [], "jpeg_size is not differentiable"),
    "reward": ({"rewards": [{"name": "pickscor"}]}, [], "'pickscor': did you mean 'pickscore'"),
    "weights": ({"rewards": [{"name": "pickscore", "model": "./gone"}]}, [], "pickscore: no such file"),
    "asset": ({"train_prompts": "asset:gone.txt"}, [], "asset:gone.txt: no such asset"),
    "useless model": ({"rewards": [{"name": "brightness", "model": "x"}]}, [], "brightness has no weights"),
    "same reward": ({"rewards": [{"name": "hpsv2", "model": "a/b/c"}]}, [], "must differ in name"),
    "batch size": ({"rewards": [{"name": "pickscore", "batch_size": 0}]}, [], "at least 1 or null, got 0"),
    "no prompts": ({"train_prompts": "empty.txt"}, [], "empty.txt: no prompt in it"),
    "binary prompts": ({"train_prompts": "binary.txt"}, [], "binary.txt: cannot be read"),
    "column": ({"train_prompts": "other.csv"}, [], "no column 'prompt'; it has 'text'"),
    "one eval prompt": ({"max_eval_prompts": 1}, [], "need at least 2 prompts"),
    "eval rewards": ({"eval_prompts": None}, [], "--eval_rewards needs --eval_prompts"),
    "method": ({"method": "adjoint"}, [], "unknown method 'adjoint': did you mean 'adjoint_matching'"),
    "output": ({"output_dir": "empty.txt/out"}, [], "cannot write there"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_screen_and_loads_no_model(
    case, folder, tiny_sd3_dir, tmp_path, monkeypatch, capsys
):
    changes, flags, message = BAD_INPUT[case]
    own = {"rewards": [{"name": "pickscore", "model": str(folder / "pickscore")}]}
    own["eval_rewards"] = [{"name": "hpsv2", "model": str(folder / "hpsv2")}]
    config = tiny_config(tiny_sd3_dir, tmp_path, **(own | changes))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "other.csv").write_text("text\nhello\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, "finetune.py", "--config", config, *flags)
    text = str(stopped.value.code)
    assert text.startswith("error: ")
    assert message in text
    assert len(text.splitlines()) <= 6


def test_batch_size_must_be_a_multiple_of_the_processes(folder, tiny_sd3_dir):
    config = parse_config(["--config", str(tiny_config(tiny_sd3_dir, folder))])
    with pytest.raises(ValueError, match=r"--train_batch_size 4 .* multiple of their number, 3"):
        make_plan(config, 3)


def test_a_run_that_stops_prints_no_traceback_but_keeps_it(folder, tiny_sd3_dir, tmp_path, monkeypatch):
    """Weights that are NaN: found by the first images, after loading."""
    broken = tmp_path / "model"
    StableDiffusion3Pipeline.from_pretrained(
        tiny_sd3_dir, text_encoder_3=None, tokenizer_3=None
    ).save_pretrained(broken)
    weights = broken / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["proj_out.bias"].fill_(float("nan"))
    save_file(state, weights)
    own = {"rewards": [{"name": "pickscore", "model": str(folder / "pickscore")}], "eval_rewards": None}
    config = tiny_config(broken, tmp_path, **own, eval_prompts=None)
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, "finetune.py", "--config", config)
    assert str(stopped.value.code).startswith("error: base images of ['")
    assert len(str(stopped.value.code).splitlines()) <= 6
    assert "Traceback" in (tmp_path / "out/error.txt").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(folder, tiny_sd3_dir, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_sd3_dir, folder)
    output = tmp_path / "not/there"
    monkeypatch.setattr(Model, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    run_script(monkeypatch, "finetune.py", "--config", config, "--output_dir", output, "--dry_run")
    printed = capsys.readouterr().out
    assert not output.exists()
    (tmp_path / "plan.yaml").write_text(printed)
    again = parse_config(["--config", str(tmp_path / "plan.yaml")])
    assert again.run.output_dir == str(output)
    for line in (
        "# samples an iteration: 4 = 1 processes x 4",
        "# training prompts: 3 (5.33 epochs)",
        "# transformer calls a sample, base, forward and backward: 6",
        "# validation every 2 iterations: 6 images (3 prompts x 2 images, 3 in the grid), and once of the "
        "base; as many for the certificate, and once 24 of the base",
        "# evaluation: 3 prompts, 6 images of base and tuned each",
    ):
        assert line in printed.splitlines()
    assert "# memory of a process by phase (estimated" in printed
    assert "#   peak: " in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    config = parse_config(["--config", str(path)])
    assert config.run.output_dir == f"outputs/{path.stem}"
    assert config.evaluation.eval_rewards
    text = path.read_text()
    assert path.stem.startswith("tiny_sd3") or "Never run here" in text
    for line in text.splitlines():
        assert len(line) <= 110


def test_finetune_is_thin():
    assert len(Path(FINETUNE).read_text().splitlines()) <= 80


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """`torchrun` on a CPU without ACCELERATE_USE_CPU starts two runs of one process in one folder."""
    arguments = ["--config", str(FINETUNE.parent.parent / "configs" / "tiny_sd3.yaml"), "--report_to", "none"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU"):
        make_accelerator(parse_config(arguments))


def test_accelerate_configs_are_read_by_accelerate():
    folder = FINETUNE.parent.parent / "configs/accelerate"
    found = {file.stem: load_config_from_file(str(file)) for file in folder.glob("*.yaml")}
    assert {name: config.num_processes for name, config in found.items()} == {
        "one_gpu": 1,
        "eight_gpus": 8,
        "two_nodes": 16,
    }


def test_wrappers_of_accelerate_are_refused(monkeypatch):
    arguments = ["--config", str(FINETUNE.parent.parent / "configs" / "tiny_sd3.yaml"), "--report_to", "none"]
    with pytest.raises(ValueError, match="--shard_weights spreads weights over processes: launch several"):
        make_accelerator(parse_config([*arguments, "--shard_weights"]))
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="accelerate's FSDP and DeepSpeed wrap"):
        make_accelerator(parse_config(arguments))
