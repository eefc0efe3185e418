"""Images that are no squares: 96 x 64 pixels in training, evaluation, sampling and estimates."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate.report import estimate
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.models.origin import read_about
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.run.resume import settings_of
from am_diffusers.system.processes import Processes
from am_diffusers.system.resolution import Resolution, read_resolution
from evaluating.driver import evaluate
from evaluating.options import parse
from evaluating.plan import make_plan as plan_evaluation
from finetune_runs import FINETUNE, read_metrics, tiny_config, write_rewards

SHORT = {
    "rewards": [{"name": "brightness"}],
    "eval_rewards": None,
    "eval_prompts": None,
    "certificate_images": 0,
    "num_validation_prompts": 1,
    "num_validation_images": 1,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "report_to": "none",
    "resolution": "96x64",
}


def planned(model, folder, **changes):
    return make_plan(parse_config(["--config", str(tiny_config(model, folder, **(SHORT | changes)))]), 1)


@pytest.mark.parametrize(
    ("value", "size", "setting"),
    [
        (512, (512, 512), 512),
        ("64", (64, 64), 64),
        ("832x480", (832, 480), "832x480"),
        ("64x64", (64, 64), 64),
    ],
)
def test_width_comes_first_and_one_number_is_a_square(value, size, setting):
    read = read_resolution(value)
    assert (read, read.setting) == (size, setting)
    assert read.width == size[0]


@pytest.mark.parametrize("value", ["0", "64x0", "64x", "x64", "64*96", "64x96x3", "-64", "64.0", ""])
def test_what_is_no_size_is_refused(tiny_sd3_dir, tmp_path, value):
    message = "must be a side in pixels such as 512, or WIDTHxHEIGHT such as 832x480, got "
    with pytest.raises(ValueError, match=message):
        read_resolution(value)
    with pytest.raises(ValueError, match=f"--resolution {message}"):
        planned(tiny_sd3_dir, tmp_path, resolution=value)


def test_a_side_that_the_model_cannot_make_is_refused_with_the_nearest(tiny_sd3_dir, tmp_path):
    with pytest.raises(ValueError, match="width 92 is not a multiple of 8 pixels: use 88 or 96"):
        planned(tiny_sd3_dir, tmp_path, resolution="92x64")
    with pytest.raises(ValueError, match="height 68 is not a multiple of 8 pixels: use 64 or 72"):
        planned(tiny_sd3_dir, tmp_path, resolution="96x68")
    with pytest.raises(ValueError, match="width 127 is not a multiple of 8 pixels: use 120 or 128"):
        planned(tiny_sd3_dir, tmp_path, resolution="127x64")


def test_a_run_trains_shows_and_names_such_images(tiny_sd3_dir, tmp_path):
    write_rewards(tmp_path)
    rewards = [{"name": "pickscore", "model": str(tmp_path / "pickscore")}]
    held_out = [{"name": "hpsv2", "model": str(tmp_path / "hpsv2")}]
    changes = {"eval_prompts": str(tmp_path / "eval.txt"), "eval_rewards": held_out, "rewards": rewards}
    plan = planned(tiny_sd3_dir, tmp_path, **changes)
    run = build(plan, make_accelerator(plan.config))
    assert run.trainer.hooks.validate.scorer.sampler.latents.shape == (8, 16, 24)
    run.execute()
    out = tmp_path / "out"
    assert len(read_metrics(out)) == 2
    with Image.open(out / "samples/iteration-000002.png") as grid:
        # Base and tuned are 96 wide; a row is a line, the image of 64, a line and the margin.
        assert grid.size == (6 + 2 * (96 + 6), 16 + 6 + 3 * (16 + 64 + 16 + 6) + 16)
    assert read_about(out / LORA_FILE)["modelspec.resolution"] == "96x64"
    card = (out / "README.md").read_text()
    assert "at 96 x 64 pixels" in card
    assert "    height=64,\n    width=96,\n" in card
    assert yaml.safe_load((out / "config.yaml").read_text())["resolution"] == "96x64"


def test_the_same_size_in_other_words_resumes(tiny_sd3_dir, tmp_path):
    found = [settings_of(planned(tiny_sd3_dir, tmp_path, resolution=r))["resolution"] for r in (64, "64x64")]
    assert found == [64, 64]
    assert settings_of(planned(tiny_sd3_dir, tmp_path))["resolution"] == "96x64"


def pipeline_image(tiny_sd3_dir, **more):
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir, text_encoder_3=None, tokenizer_3=None)
    sizes = {"height": 64, "width": 96, "max_sequence_length": 8, "num_inference_steps": 2}
    return pipe("a red fox", guidance_scale=1.0, **sizes, **more).images


def test_sampling_is_the_pipelines(tiny_sd3_dir, tmp_path, monkeypatch):
    sizes = ["--resolution", "96x64", "--max_sequence_length", 8, "--num_inference_steps", 2]
    flags = ["--model", tiny_sd3_dir, "--prompts", "a red fox", "--output", tmp_path, *sizes]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    runpy.run_path(str(FINETUNE.parent / "sample.py"), run_name="__main__")
    ours = np.asarray(Image.open(tmp_path / "0000-seed0.png")).astype(int)
    (expected,) = pipeline_image(tiny_sd3_dir, generator=torch.Generator().manual_seed(0))
    assert ours.shape == (64, 96, 3)
    assert np.abs(ours - np.asarray(expected).astype(int)).max() <= 1


def test_an_evaluation_makes_measures_and_shows_such_images(tiny_sd3_dir, tmp_path):
    write_rewards(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red fox\na blue clock\n")
    flags = {
        "pretrained_model_name_or_path": tiny_sd3_dir,
        "prompts": tmp_path / "prompts.txt",
        "rewards": f"hpsv2={tmp_path / 'hpsv2'}",
        "output_dir": tmp_path / "out",
        "resolution": "96x64",
        "max_sequence_length": 8,
        "num_inference_steps": 2,
        "num_images_per_prompt": 2,
    }
    plan = plan_evaluation(
        parse([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    )
    list(evaluate(plan, Processes(Accelerator())))
    assert json.loads((tmp_path / "out/settings.json").read_text())["resolution"] == "96x64"
    files = sorted((tmp_path / "out/pictures").rglob("*.png"))
    times = [file.stat().st_mtime_ns for file in files]
    assert [Image.open(file).size for file in files] == [(96, 64)] * 4
    list(evaluate(plan, Processes(Accelerator())))  # images of the wrong size would be made again
    assert [file.stat().st_mtime_ns for file in files] == times


def test_estimates_scale_with_the_area(tiny_sd3_dir, tmp_path):
    def flops(resolution):
        plan = planned(tiny_sd3_dir, tmp_path, resolution=resolution)
        return estimate(plan, make_accelerator(plan.config), on_gpu=False).iteration_flops().total()

    wide, tall, small, large = (flops(size) for size in ("96x64", "64x96", "64", "96"))
    assert wide == tall
    assert 1.3 * small < wide < large / 1.3


def test_the_flag_is_that_of_all_commands():
    needed = ["--pretrained_model_name_or_path", "x", "--prompts", "y", "--rewards", "z", "--output_dir", "o"]
    assert parse([*needed, "--resolution", "832x480"]).resolution == Resolution(width=832, height=480)
