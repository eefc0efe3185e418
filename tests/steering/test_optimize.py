"""`scripts/optimize.py` on the embedded pipeline: its folder, inputs for plain Diffusers, what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from am_diffusers.evaluation.images import PURPOSE
from am_diffusers.noise import generator_for
from am_diffusers.steering import chain
from am_diffusers.steering.plan import check_takes_embeddings
from am_diffusers.system.failures import NonFiniteError
from finetune_runs import FINETUNE

MODEL = "am_diffusers/assets/tiny_sd3"
PROMPTS = ["a frog on a red background", "a key on a black background"]


@pytest.fixture
def optimize(tmp_path, monkeypatch):
    """A function from flags to the folder of results."""
    monkeypatch.chdir(FINETUNE.parent.parent)

    def optimize(*more, name="out"):
        flags = ["--model", MODEL, "--prompts", *PROMPTS, "--num_inference_steps", 2, "--iterations", 2]
        flags += ["--output", tmp_path / name, "--rewards", "brightness", *more]
        monkeypatch.setattr(sys, "argv", ["optimize.py", *map(str, flags)])
        runpy.run_path(str(FINETUNE.parent / "optimize.py"), run_name="__main__")
        return tmp_path / name

    return optimize


def results(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    return found | {each["name"]: each for each in found["candidates"]}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def diffusers_call(prompt, **inputs):
    pipe = StableDiffusion3Pipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    text = {} if "prompt_embeds" in inputs else {"prompt": prompt, "max_sequence_length": 4}
    sizes = {"height": 64, "width": 64, "guidance_scale": 1.0, "num_inference_steps": 2}
    return np.asarray(pipe(**text, **inputs, **sizes).images[0]).astype(int)


@pytest.mark.parametrize(
    ("target", "more"), [("noise", ()), ("embeddings", ("--gradient", "deis2", "--gradient_steps", 1))]
)
def test_a_plain_diffusers_call_makes_the_images_of_the_files(optimize, target, more):
    folder = optimize("--optimize", target, "--num_images", 2, "--best_of", 3, *more)
    key = f"{target}-{more[1] if more else 'exact'}"
    found, name = results(folder), f"{key}-steps2-guidance1"
    scores, base = (np.array(found[each]["scores"]["brightness"]) for each in (key, "base"))
    assert scores.shape == (2, 2)
    assert (scores >= base).all()
    assert (scores > base).any()
    assert (np.array(found["best_of_3"]["scores"]["brightness"]) >= base).all()
    # Two iterations of 2 forward passes and of 2 or 1 steps back, forward and backward; the last image.
    assert found[key]["passes_per_image"] == (2 * (2 + 2 * 1) + 2 if more else 2 * (2 + 2 * 2) + 2)
    assert found["best_of_3"]["passes_per_image"] == 6
    for stem in ("00000-001", "00001-000"):
        file = folder / "inputs" / name / f"{stem}.safetensors"
        with safe_open(file, framework="pt") as opened:
            prompt = opened.metadata()["prompt"]
        assert prompt == PROMPTS[int(stem[4])]
        made = pixels(folder / "pictures" / name / f"{stem}.png")
        assert np.abs(diffusers_call(prompt, **load_file(file)) - made).max() <= 1
        seed = generator_for(0, PURPOSE, int(stem[4]), int(stem[-1])).initial_seed()
        plain = diffusers_call(prompt, generator=torch.Generator().manual_seed(seed))
        assert np.abs(plain - pixels(folder / "pictures/base-steps2-guidance1" / f"{stem}.png")).max() <= 1
        assert np.abs(plain - made).max() > 1
    trace = found[key]["traces"]["00000-001"]
    assert max(trace["rewards"]) == trace["rewards"][trace["best_iteration"]]


def test_the_tilt_by_chains_and_by_importance_sampling(optimize, capsys):
    folder = optimize("--sample", "--chain_steps", 8, "--thin", 4, "--chains", 2, "--importance", 6)
    told = capsys.readouterr().out
    found = results(folder)["tilt_1"]["prompt 1"]
    assert len(list((folder / "pictures/tilt_1-steps2-guidance1").iterdir())) == 2 * 2 * 2
    assert len(found["chains"]["weights"]) == 4
    assert sum(found["importance"]["weights"]) == pytest.approx(1)
    assert "the chains have not mixed" in told
    assert told.count("effective share") == 2
    # The brightness of images is in [0, 1]: at scale 1 the tilt is gentle.
    assert abs(found["chains"]["mean"] - found["base_mean"]) < 0.2


def test_rewards_without_gradient_have_best_of(optimize):
    folder = optimize("--rewards", "jpeg_size", "--best_of", 2)
    found = results(folder)
    assert [each["name"] for each in found["candidates"]] == ["base", "best_of_2"]
    scores, base = (np.array(found[name]["scores"]["jpeg_size"]) for name in ("best_of_2", "base"))
    assert (scores >= base).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to do: pass --optimize"),
        (
            ("--optimize", "noise", "--sampler", "ancestral"),
            "noise: the starting noise of ancestral",
        ),
        (("--sample", "--sampler", "memoryless_euler"), "--sample: the starting noise of memoryless_euler"),
        (("--sample", "--optimize", "embeddings"), "leave --optimize embeddings out"),
        (("--sample", "--chain_steps", 4), "--chain_steps of at least 8"),
        (
            ("--optimize", "noise", "--sampler", "FlowMatchHeunDiscreteScheduler"),
            "gradients need a table of steps",
        ),
        (
            ("--optimize", "embeddings", "--sampler", "ancestral", "--num_inference_steps", 1),
            "at least 2, got 1",
        ),
        (("--optimize", "noise", "--rewards", "jpeg_size"), "jpeg_size has no gradient: only --best_of"),
        (("--optimize", "noise", "--rewards", "world_clean"), "world_clean judges what others climb"),
        (("--optimize", "noise", "--rewards", "brigthness"), "did you mean 'brightness'"),
        (("--optimize", "noise", "--held_out_rewards", "brightness"), "give each name once"),
        (("--optimize", "noise", "--weights", 1, 2), "2 numbers for 1 rewards"),
        (("--optimize", "noise", "--gradient_steps", 2), "--gradient deis1 and deis2"),
        (
            ("--optimize", "noise", "--gradient", "deis1", "--gradient_steps", 3),
            "at most --num_inference",
        ),
        (("--optimize", "noise", "--resolution", 50), "not a multiple of"),
        (("--optimize", "noise", "--max_sequence_length", 600), "expected 1 to 512"),
        (("--optimize", "noise", "--lora", "nowhere"), "nowhere"),
        (("--optimise", "noise"), "did you mean --optimize?"),
    ],
)
def test_mistakes_end_in_one_line_before_a_model_is_loaded(optimize, tmp_path, monkeypatch, flags, message):
    def load(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", load)
    with pytest.raises(SystemExit) as error:
        optimize(*flags)
    line = str(error.value)
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_left_alone(optimize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds the results of another call"):
        optimize("--optimize", "noise")


def test_pipelines_that_take_no_embeddings_are_named():
    class Closed:
        def __call__(self, prompt):
            """Take text alone."""

    with pytest.raises(ValueError, match="Closed takes no prompt embeddings: use --optimize noise"):
        check_takes_embeddings(Closed)
    check_takes_embeddings(StableDiffusion3Pipeline)


def test_a_gradient_that_is_not_finite_is_told_and_the_best_so_far_written(optimize, monkeypatch, capsys):
    calls = []

    def failing(*arguments):
        calls.append(None)
        if len(calls) > 1:
            raise NonFiniteError("gradient of latents at step 1 (sigma 0.5) is NaN")
        return exact(*arguments)

    exact = chain.exact_gradients
    monkeypatch.setattr(chain, "exact_gradients", failing)
    found = results(optimize("--optimize", "noise", "--prompts", PROMPTS[0]))
    line = "stopped at iteration 1: gradient of latents at step 1 (sigma 0.5) is NaN"
    assert f"{line}; the best so far is kept" in capsys.readouterr().out
    assert found["noise-exact"]["notes"] == [f"00000: {line}"]
    assert found["noise-exact"]["scores"] == found["base"]["scores"]


def test_guided_embeddings_of_a_stochastic_sampler_climb(optimize):
    flags = ("--sampler", "ancestral", "--guidance_scale", 2, "--prompts", PROMPTS[0], "--step_size", 0.1)
    found = results(optimize("--optimize", "embeddings", *flags))
    trace = found["embeddings-exact"]["traces"]["00000-000"]
    assert trace["best_iteration"] > 0
    assert max(trace["rewards"]) > trace["rewards"][0]
    assert found["embeddings-exact"]["passes_per_image"] == 2 * (2 * (2 + 4) + 2)
