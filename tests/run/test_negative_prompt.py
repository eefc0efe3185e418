"""One negative prompt for sampling, rollouts, validation and evaluation: as the pipeline takes it."""

import runpy
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from am_diffusers.config.command_line import parse_config
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.models.origin import read_origin
from am_diffusers.run.build import build
from am_diffusers.run.fields import guided
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import make_sampler
from am_diffusers.run.plan import make_plan
from am_diffusers.run.resume import settings_of
from evaluating.generate import Generator, load_model
from evaluating.options import parse
from evaluating.plan import make_plan as plan_evaluation
from evaluating.store import Store
from finetune_runs import FINETUNE, tiny_config

NEGATIVE, PROMPT = "a blue clock", "a red fox"
SHORT = {
    "rewards": [{"name": "brightness"}],
    "eval_rewards": None,
    "eval_prompts": None,
    "certificate_images": 0,
    "num_validation_prompts": 1,
    "validation_prompts": [PROMPT],
    "train_batch_size": 2,
    "max_train_steps": 1,
    "report_to": "none",
}
GUIDED = {"rollout_guidance_scale": 3.0, "eval_guidance_scale": 4.0, "negative_prompt": NEGATIVE}


@pytest.fixture
def pipe(tiny_sd3_dir):
    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir, text_encoder_3=None, tokenizer_3=None)


def image_of(pipe, negative, steps, **more):
    sizes = {"height": 64, "width": 64, "max_sequence_length": 8, "num_inference_steps": steps}
    return pipe(PROMPT, negative_prompt=negative, guidance_scale=4.0, **sizes, **more).images


def test_sampling_is_the_pipelines(tiny_sd3_dir, tmp_path, monkeypatch, pipe):
    def sample(*more):
        sizes = ["--resolution", 64, "--max_sequence_length", 8, "--num_inference_steps", 2]
        flags = ["--model", tiny_sd3_dir, "--prompts", PROMPT, "--output", tmp_path / "out", *sizes, *more]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        runpy.run_path(str(FINETUNE.parent / "sample.py"), run_name="__main__")
        return np.asarray(Image.open(tmp_path / "out/0000-seed0.png")).astype(int)

    ours = sample("--guidance_scale", 4, "--negative_prompt", NEGATIVE)
    expected, plain = (
        np.asarray(image_of(pipe, negative, 2, generator=torch.Generator().manual_seed(0))[0]).astype(int)
        for negative in (NEGATIVE, "")
    )
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(plain - expected).max() > 10
    with pytest.raises(SystemExit, match="error: --negative_prompt has no effect without guidance: set "):
        sample("--negative_prompt", NEGATIVE)


def test_a_run_leads_away_from_it_in_rollouts_and_images_and_names_it(tiny_sd3_dir, tmp_path, pipe):
    config = parse_config(["--config", str(tiny_config(tiny_sd3_dir, tmp_path, **(SHORT | GUIDED)))])
    run = build(make_plan(config, 1), make_accelerator(config))
    embeddings, _, pooled, _ = pipe.encode_prompt(
        NEGATIVE, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    cond = run.trainer.hooks.encode(["a red apple"])
    torch.testing.assert_close(cond.negative_embeddings, embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(cond.negative_pooled, pooled, atol=1e-5, rtol=0)
    scorer = run.trainer.hooks.validate.scorer
    assert image_error(scorer.sampler, scorer.base, pipe) < 1e-4
    run.execute()
    origin = read_origin(tmp_path / "out" / LORA_FILE)
    assert origin is not None
    assert origin.negative_prompt == NEGATIVE
    assert f'negative_prompt="{NEGATIVE}",' in (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["negative_prompt"] == NEGATIVE


def image_error(sampler, field, pipe):
    """How far a sampler's image is from the pipeline's, of the same noise."""
    noise = torch.randn(1, *sampler.latents.shape, generator=torch.Generator().manual_seed(5))
    image = sampler.decode(sampler.solver(field, sampler.encode([PROMPT]), noise, []).latents)
    expected = image_of(pipe, NEGATIVE, 3, latents=noise, output_type="pt")
    plain = image_of(pipe, "", 3, latents=noise, output_type="pt")
    assert (plain - expected).abs().max() > 0.05
    return (image - expected).abs().max()


def test_an_evaluation_leads_away_from_it_and_does_not_go_on_with_other_images(tiny_sd3_dir, tmp_path, pipe):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")

    def plan(*more):
        flags = {
            "pretrained_model_name_or_path": tiny_sd3_dir,
            "prompts": tmp_path / "prompts.txt",
            "rewards": "brightness",
            "output_dir": tmp_path / "out",
            "resolution": 64,
            "max_sequence_length": 8,
            "num_inference_steps": 3,
            "num_images_per_prompt": 1,
        }
        argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return plan_evaluation(parse([*argv, *more]))

    guidance = ("--guidance_scale", "4")
    plans = [plan(*guidance, "--negative_prompt", NEGATIVE), plan(*guidance)]
    stores = [Store(tmp_path / "out", p.settings, p.prompts.prompts, 1, p.size) for p in plans]
    stores[0].open(plans[0].candidates)
    with pytest.raises(ValueError, match=f"negative_prompt was '{NEGATIVE}', now None"):
        stores[1].open(plans[1].candidates)
    (candidate,) = plans[0].candidates
    batches = [(candidate, stores[0].chunks[0])]
    model = load_model(plans[0], batches, torch.device("cpu"))
    sampler = Generator(plans[0], stores[0], model).sampler(candidate)
    assert image_error(sampler, guided(model.base, 4.0), pipe) < 1e-4
    with pytest.raises(ValueError, match="--negative_prompt has no effect without guidance: set --guidance"):
        plan("--negative_prompt", NEGATIVE)
    with pytest.raises(ValueError, match="--negative_prompt"):
        plan(*guidance, "--negative_prompt", "\ud83d")


def test_one_without_effect_is_refused(tiny_sd3_dir, tmp_path):
    config = tiny_config(tiny_sd3_dir, tmp_path, **(SHORT | {"negative_prompt": NEGATIVE}))
    message = "--negative_prompt must be empty without guidance: --rollout_guidance_scale or --eval_guidance"
    with pytest.raises(ValueError, match=message) as error:
        parse_config(["--config", str(config)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rollout", [1.0, 3.0])
def test_a_resume_compares_it_where_rollouts_are_guided(tiny_sd3_dir, tmp_path, rollout):
    changes = SHORT | GUIDED | {"rollout_guidance_scale": rollout}
    config = parse_config(["--config", str(tiny_config(tiny_sd3_dir, tmp_path, **changes))])
    assert ("negative_prompt" in settings_of(make_plan(config, 1))) == (rollout > 1)


def test_the_sampler_of_an_unguided_evaluation_has_none(model, tiny_sd3_dir, tmp_path):
    changes = SHORT | GUIDED | {"eval_guidance_scale": 1.0}
    config = parse_config(["--config", str(tiny_config(tiny_sd3_dir, tmp_path, **changes))])
    assert make_sampler(config, model).encode([PROMPT]).negative_embeddings is None
