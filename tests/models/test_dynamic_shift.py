"""Schedulers whose shift of noise levels depends on the image's size: the pipeline's levels, everywhere."""

import json
import math
import shutil

import diffusers
import pytest
import torch

from am_diffusers.config.command_line import parse_config
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.schedulers import make_solver
from am_diffusers.models.sd3 import SD3
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.transitions import shifted_sigmas
from conftest import tiny_pipeline
from families import PROMPTS, strong_lora
from finetune_runs import read_metrics, tiny_config

# 64 x 64 pixels of the tiny pipeline are 64 tokens.
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 128}
SCHEDULERS = {
    "defaults": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "exponential": ("FlowMatchEulerDiscreteScheduler", DYNAMIC | {"base_shift": 0.3, "max_shift": 2.0}),
    "linear": ("FlowMatchEulerDiscreteScheduler", DYNAMIC | {"time_shift_type": "linear"}),
    "terminal": ("FlowMatchEulerDiscreteScheduler", DYNAMIC | {"shift_terminal": 0.02}),
    "fixed, terminal": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0, "shift_terminal": 0.1}),
    "lcm": ("FlowMatchLCMScheduler", DYNAMIC),
}


def pipeline(name, settings):
    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, name)(**settings)
    return pipe


def call(pipe, height, width, steps, **more):
    """The levels at which the real pipeline makes an image, and the image."""
    sizes = {"height": height, "width": width, "num_inference_steps": steps, "max_sequence_length": 8}
    image = pipe(PROMPTS[0], guidance_scale=1.0, output_type="pt", **sizes, **more).images
    return pipe.scheduler.sigmas.double(), image


@pytest.mark.parametrize("case", SCHEDULERS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
def test_ode_levels_are_those_of_the_pipelines_call(case, height, width):
    model = Model(pipeline(*SCHEDULERS[case]), SD3)
    shape = model.latent_shape(height, width)
    ours = model.ode_sigmas(6, shape)
    expected, _ = call(model.pipeline(), height, width, 6)
    assert torch.equal(ours, expected)


def test_another_size_has_other_levels():
    model = Model(pipeline(*SCHEDULERS["exponential"]), SD3)
    levels = [model.ode_sigmas(4, model.latent_shape(*size)) for size in ((64, 64), (64, 96), (96, 64))]
    assert (levels[1] - levels[0]).max() > 0.02
    assert torch.equal(levels[1], levels[2])


@pytest.mark.parametrize("case", ["defaults", "exponential", "linear", "terminal"])
def test_stochastic_levels_have_the_pipelines_shift_and_no_terminal_level(case):
    name, settings = SCHEDULERS[case]
    model = Model(pipeline(name, settings | {"shift_terminal": None}), SD3)
    even = torch.linspace(1, 0.1, 10).tolist()
    expected, _ = call(model.pipeline(), 64, 64, 10, sigmas=even)
    ours = Model(pipeline(name, settings), SD3).solver("ancestral", 10, model.latent_shape(64, 64))
    torch.testing.assert_close(ours.transitions.sigmas, expected, atol=1e-6, rtol=0)
    assert (expected - torch.linspace(1, 0, 11)).abs().max() > 0.05


@pytest.mark.parametrize("name", ["ode_euler", "FlowMatchEulerDiscreteScheduler"])
def test_the_picture_is_the_pipelines(name):
    model = strong_lora(Model(pipeline(*SCHEDULERS["exponential"]), SD3))
    noise = torch.randn(1, *model.latent_shape(64, 96), generator=torch.Generator().manual_seed(5))
    cond = model.encode_prompts(PROMPTS[:1], max_sequence_length=8)
    image = model.decode(model.solver(name, 4, noise.shape[1:])(model.policy, cond, noise, []).latents)
    _, expected = call(model.pipeline(), 64, 96, 4, latents=noise)
    assert (image - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize("case", ["exponential", "linear"])
@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler_gets_the_dynamic_shift(case, name):
    pipe = pipeline(*SCHEDULERS[case])
    model = Model(pipe, SD3)
    solver = model.solver(name, 4, model.latent_shape(64, 64))
    expected = model.sde_sigmas(4, model.latent_shape(64, 64))
    shift = solver.scheduler.config["shift" if name.startswith("Flow") else "flow_shift"]
    torch.testing.assert_close(shifted_sigmas(4, shift), expected, atol=1e-6, rtol=0)
    assert solver.mu is None


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_training_takes_the_shift_of_a_multistep_scheduler(name):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    model = Model(pipeline(name, flow | {"flow_shift": 3.0}), SD3)
    ours = model.sde_sigmas(5, model.latent_shape(64, 64))
    torch.testing.assert_close(ours, shifted_sigmas(5, 3.0), atol=1e-6, rtol=0)
    model = Model(pipeline(name, flow | {"use_dynamic_shifting": True}), SD3)
    mu = 0.5 + 0.66 * (64 - 256) / (4096 - 256)  # these schedulers' settings lack the four numbers
    ours = model.sde_sigmas(5, model.latent_shape(64, 64))
    torch.testing.assert_close(ours, shifted_sigmas(5, math.exp(mu)), atol=1e-6, rtol=0)
    ours = model.ode_sigmas(5, model.latent_shape(64, 64))
    expected, _ = call(model.pipeline(), 64, 64, 5)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("own", "settings", "reason"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "its levels follow shift_terminal"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "follow use_karras_sigmas"),
        ("UniPCMultistepScheduler", {}, "it has no shift"),
    ],
)
def test_levels_that_no_shift_makes_are_not_given_to_another_scheduler(own, settings, reason):
    made = getattr(diffusers, own)(**settings)
    with pytest.raises(ValueError, match=f"the model's {own} has no shift .*{reason}.*: sample with {own}"):
        make_solver(made, "DPMSolverMultistepScheduler", 4)


def with_scheduler(tiny_sd3_dir, folder, name, settings):
    """A copy of the tiny pipeline's folder with another scheduler."""
    shutil.copytree(tiny_sd3_dir, folder)
    getattr(diffusers, name)(**settings).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    return folder


SHORT = {
    "rewards": [{"name": "brightness"}],
    "eval_rewards": None,
    "eval_prompts": None,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "report_to": "none",
}


def test_a_run_trains_and_validates_at_the_pipelines_levels(tiny_sd3_dir, tmp_path):
    folder = with_scheduler(tiny_sd3_dir, tmp_path / "model", *SCHEDULERS["terminal"])
    config = parse_config(["--config", str(tiny_config(folder, tmp_path, **SHORT))])
    plan = make_plan(config, 1)
    run = build(plan, make_accelerator(config))
    run.execute()
    assert len(read_metrics(tmp_path / "out")) == 2
    sampler = run.trainer.hooks.validate.scorer.sampler
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    expected, _ = call(pipe, 64, 64, 3)
    assert torch.equal(sampler.solver.transitions.sigmas, expected)
    levels = Pretrained(str(folder)).levels().sigmas(3, sampler.latents.shape, stochastic=False)
    assert torch.equal(levels, expected)


def test_a_scheduler_without_levels_for_training_is_refused_before_loading(tiny_sd3_dir, tmp_path):
    folder = with_scheduler(tiny_sd3_dir, tmp_path / "model", "UniPCMultistepScheduler", {})
    config = parse_config(["--config", str(tiny_config(folder, tmp_path, **SHORT)), "--dry_run"])
    with pytest.raises(ValueError, match=r"the model's scheduler doesn't suit these flags: .*") as error:
        make_plan(config, 1)
    assert "\n" not in str(error.value)
