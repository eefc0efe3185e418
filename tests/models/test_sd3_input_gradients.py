"""Gradients of Stable Diffusion 3 in noise, embeddings and LoRA, against autograd through its steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from am_diffusers.input_gradients import exact_gradients, record
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.rollout import noise_level
from am_diffusers.transitions import ode_euler, uniform_sigmas
from am_diffusers.velocity import GuidedField
from families import PROMPTS, strong_lora
from live_bytes import LiveBytes


def in_float64(folder: Path) -> Model:
    model = strong_lora(Model.from_pretrained(Pretrained(str(folder)), weight_dtype=torch.float64))
    for parameter in model.lora_parameters().values():
        parameter.data = parameter.data.double()
    return model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_exact_gradients_are_autograd_through_the_pipelines_steps(
    tiny_sd3_dir: Path, guidance_scale: float
) -> None:
    model = in_float64(tiny_sd3_dir)
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8, negative_prompt="")
    noise = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(3))
    noise, parameters = noise.double(), list(model.lora_parameters().values())
    field = GuidedField(model.policy, guidance_scale)
    transitions = ode_euler(uniform_sigmas(3))
    recorded = record(field, transitions, cond, noise)
    target = torch.ones_like(noise)
    got = exact_gradients(field, recorded, transitions, recorded.final - target, parameters)

    assert cond.embeddings is not None
    assert cond.pooled is not None
    leaves = [value.double().requires_grad_() for value in (noise.clone(), cond.embeddings, cond.pooled)]
    tracked, x = replace(cond, embeddings=leaves[1], pooled=leaves[2]), leaves[0]
    for k in range(3):
        x = transitions.mean(k, x, field(x, noise_level(transitions, k, x), tracked))
    expected = torch.autograd.grad((x - target).square().sum() / 2, [*leaves, *parameters])
    found = (got.latents, got.embeddings, got.pooled, *got.parameters)
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        # SD3's RMS norm rounds to float32 inside a float64 model, forward and backward.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())
    assert all(parameter.grad is None for parameter in parameters)
    assert sum(bool(gradient.any()) for gradient in got.parameters) > len(parameters) / 2


def test_gradients_of_half_precision_weights_keep_small_cotangents(tiny_sd3_dir: Path) -> None:
    """Embeddings of float16 have gradients in float32: a cotangent of 1e-6 doesn't underflow."""
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)), weight_dtype=torch.bfloat16)
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    x = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0.8, 0.3])
    assert cond.embeddings is not None
    assert cond.pooled is not None
    half = replace(cond, embeddings=cond.embeddings.half(), pooled=cond.pooled.half())
    _, large = model.base.input_vjp(x, sigma, half, torch.ones_like(x))
    _, small = model.base.input_vjp(x, sigma, half, 2.0**-40 * torch.ones_like(x))
    for a, b in zip(small[:3], large[:3], strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == torch.float32
        assert torch.equal(a * 2.0**40, b)
        assert b.any()


@pytest.mark.parametrize("field", ["policy", "base"])
def test_gradient_checkpointing_changes_no_input_gradient(model: Model, field: str) -> None:
    strong_lora(model)
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    x = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(3))
    arguments = x, torch.tensor([0.8, 0.3]), cond, torch.ones_like(x)
    velocity, plain = getattr(model, field).input_vjp(*arguments)
    _, other = getattr(model, "base" if field == "policy" else "policy").input_vjp(*arguments)
    model.enable_gradient_checkpointing()
    again, checkpointed = getattr(model, field).input_vjp(*arguments)
    torch.testing.assert_close(again, velocity)
    for a, b, c in zip(checkpointed[:3], plain[:3], other[:3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert (b - c).abs().max() > 1e-3


def test_memory_does_not_grow_with_the_number_of_steps(model: Model) -> None:
    """The recorded states, which are small, aside; autograd through the sampler holds every step's tape."""
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    noise = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(3))
    peaks = []
    for steps in (2, 8, 32):
        transitions = ode_euler(uniform_sigmas(steps))
        recorded = record(model.base, transitions, cond, noise)
        with LiveBytes(smallest=1) as measured:
            exact_gradients(model.base, recorded, transitions, torch.ones_like(noise))
        # A view of a state shows the storage of all.
        peaks.append(measured.peak["memory"] - recorded.states.nbytes)
    assert max(peaks) < 1.05 * min(peaks)
    assert min(peaks) > 10 * noise.nbytes, "the tape of a step is larger than a state"
