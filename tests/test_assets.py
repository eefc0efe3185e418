"""The shipped pipeline, rewards and prompts: they load by plain library calls and do what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from am_diffusers.prompts.sets import load_texts
from am_diffusers.rewards import HPSv2, ImageReward, PickScore

ASSETS = Path(__file__).parent.parent / "am_diffusers" / "assets"
JUDGES = {"pickscore": PickScore, "hpsv2": HPSv2, "image_reward": ImageReward}
COLOURS = {"white": (245, 245, 245), "black": (25, 25, 25), "red": (210, 45, 45), "blue": (55, 105, 215)}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(ASSETS / "tiny_sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusion3Pipeline, prompt: str, **arguments: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 10, "guidance_scale": 2.5, "height": 64, "width": 64, "output_type": "pt"}
    return pipe(prompt, generator=generator, **(call | arguments)).images


def test_everything_together_is_small() -> None:
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 60e6


def test_weights_are_float32_after_a_plain_load(pipeline: StableDiffusion3Pipeline) -> None:
    assert isinstance(pipeline.transformer, SD3Transformer2DModel)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    assert 8e6 <= sum(p.numel() for p in pipeline.transformer.parameters()) <= 12e6


def test_third_text_encoder_is_the_zeros_of_a_pipeline_without_it(pipeline: StableDiffusion3Pipeline) -> None:
    with_zeros = picture(pipeline, "fox, 3d style", max_sequence_length=8)
    without = StableDiffusion3Pipeline.from_pretrained(
        ASSETS / "tiny_sd3", text_encoder_3=None, tokenizer_3=None
    )
    without.set_progress_bar_config(disable=True)
    assert torch.equal(picture(without, "fox, 3d style", max_sequence_length=8), with_zeros)


@pytest.mark.parametrize("max_sequence_length", [8, 256])
def test_backgrounds_follow_the_prompt(pipeline: StableDiffusion3Pipeline, max_sequence_length: int) -> None:
    for name, colour in COLOURS.items():
        prompt = f"lemon, flat style, on a {name} background"
        corner = picture(pipeline, prompt, max_sequence_length=max_sequence_length)[0, :, :3, :3]
        distance = (corner.mean((1, 2)) - torch.tensor(colour) / 255).abs().max()
        assert distance < 0.15, f"{name}: corner is {corner.mean((1, 2)).tolist()}"


def test_plain_call_works(pipeline: StableDiffusion3Pipeline) -> None:
    image = pipeline("star", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_prompt_lists_do_not_overlap() -> None:
    train, evaluation = (load_texts(str(ASSETS / "prompts" / f"{name}.txt")) for name in ("train", "eval"))
    assert len(evaluation) == len(set(evaluation)) == 64
    assert len(train) == len(set(train)) > 2500
    assert not set(train) & set(evaluation)


@pytest.mark.parametrize("name", JUDGES)
def test_rewards_prefer_the_right_background(name: str) -> None:
    """The pictures are plain colours: nothing but the background can be judged."""
    reward = JUDGES[name].from_pretrained(ASSETS / f"tiny_{name}")
    images = torch.stack([torch.tensor(c)[:, None, None].expand(3, 64, 64) / 255 for c in COLOURS.values()])
    for row, colour in enumerate(COLOURS):
        with torch.no_grad():
            scores = reward(images, [f"star on a {colour} background"] * len(COLOURS))
        assert scores.argmax() == row, f"{colour}: {scores.tolist()}"


def test_measured_figures_are_those_of_the_issue() -> None:
    """The committed figures (`scripts/pretrain_tiny.py measure`) against what the cards promise."""
    figures = json.loads((ASSETS / "measured.json").read_text())
    for name in JUDGES:
        assert figures[f"preference accuracy, {name}"]["mean"] >= 0.9
    for guidance in ("guidance 1.0", "guidance 2.5"):
        assert figures[guidance]["background"] >= 0.9
