"""float16: cotangents are kept in range, exactly; gradients are those of float32 up to rounding."""

from pathlib import Path

import pytest
import torch

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.system import half_precision as scaling
from am_diffusers.system.half_precision import SAFE_NORM, ScaledBackward, safe_scale
from families import point, strong_lora
from pull_backs import vjp

ROUNDING = 0.01  # float16 has 11 bits; some ten rounded layers between input and output


@pytest.fixture
def half(tiny_sd3_dir: Path) -> Model:
    return strong_lora(Model.from_pretrained(Pretrained(str(tiny_sd3_dir)), weight_dtype=torch.float16))


def relative(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Largest relative error of a sample; infinite where something is not finite."""
    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    return error.nan_to_num(nan=torch.inf).max()


def norms_of(x: torch.Tensor, norms: list[float]) -> torch.Tensor:
    factors = torch.tensor(norms) / x.flatten(1).norm(dim=1)
    return x * factors.view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_powers_of_two_that_bring_norms_into_range(dtype):
    norms = torch.logspace(-30, 30, 601, dtype=dtype)
    scales = safe_scale(norms)
    assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))
    assert ((norms * scales >= SAFE_NORM) & (norms * scales < 2 * SAFE_NORM)).all()
    assert safe_scale(torch.tensor([0.0, torch.inf, torch.nan])).tolist() == [1, 1, 1]


def test_scaled_backward_passes_add_up_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    parameter, plain, unused = (torch.nn.Parameter(torch.ones(7)) for _ in range(3))
    scaled = ScaledBackward([parameter, unused])
    for size in (1e-9, 1e5, 0.0, 1e-3, 1.0):
        x, weight = torch.randn(4, 7, generator=generator), size * torch.rand(4, generator=generator)
        scaled.backward((weight * (x * parameter - 1).square().sum(1)).sum(), weight)
        (weight * (x * plain - 1).square().sum(1)).sum().backward()
    assert not torch.equal(parameter.grad, plain.grad)
    scaled.finish()
    assert torch.equal(parameter.grad, plain.grad)
    assert unused.grad is None


def test_what_enters_the_network_has_a_safe_norm_whatever_the_loss():
    seen = []
    for size in (1e-12, 1.0, 1e12):
        parameter = torch.nn.Parameter(torch.zeros(50, 9))
        velocity = parameter * 1
        velocity.register_hook(seen.append)
        weight = size * torch.linspace(0.5, 1, 50)
        loss = (weight * (velocity - torch.linspace(0.5, 1, 9)).square().sum(1)).sum()
        ScaledBackward([parameter]).backward(loss, weight)
    for cotangent in seen:
        assert SAFE_NORM / 4 < cotangent.norm() < 2 * SAFE_NORM


NORMS = [[1e-6, 1e-6], [1.0, 1.0], [1e6, 1e6], [1e6, 1e-6]]


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("field", ["policy", "base"])
def test_vjp_in_float16_is_that_of_float32_for_every_norm(model: Model, half: Model, field, norms):
    x, sigma, cond = point(strong_lora(model))
    cotangent = norms_of(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), norms)
    velocity, product = vjp(getattr(half, field), x, sigma, cond, cotangent)
    expected = vjp(getattr(model, field), x, sigma, cond, cotangent)
    assert velocity.dtype == product.dtype == torch.float32
    assert relative(velocity, expected[0]) < ROUNDING
    assert relative(product, expected[1]) < ROUNDING


@pytest.mark.parametrize("norms", [NORMS[0], NORMS[2]])
def test_without_scaling_float16_loses_the_vjp(model: Model, half: Model, norms, monkeypatch):
    x, sigma, cond = point(strong_lora(model))
    cotangent = norms_of(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), norms)
    expected = vjp(model.base, x, sigma, cond, cotangent)
    monkeypatch.setattr(scaling, "safe_scale", torch.ones_like)
    assert relative(vjp(half.base, x, sigma, cond, cotangent)[1], expected[1]) > 0.1


def test_scaling_changes_no_bit_in_float32(model: Model, monkeypatch):
    x, sigma, cond = point(strong_lora(model))
    scaled = vjp(model.policy, x, sigma, cond, 1e-3 * x)
    monkeypatch.setattr(scaling, "safe_scale", torch.ones_like)
    plain = vjp(model.policy, x, sigma, cond, 1e-3 * x)
    assert torch.equal(scaled[1], plain[1])


def lora_gradient(model: Model, size: float, *, checkpointed: bool = False) -> torch.Tensor:
    """Gradient of a matching loss whose weights are of order `size`, in one vector."""
    if checkpointed:
        model.enable_gradient_checkpointing()
    x, sigma, cond = point(model)
    weight = size * torch.tensor([1.0, 0.3])
    scaled = ScaledBackward(list(model.lora_parameters().values()))
    difference = model.policy(x, sigma, cond) - x
    scaled.backward((weight * difference.flatten(1).square().sum(1)).sum(), weight)
    scaled.finish()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.lora_parameters().values()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return torch.cat([gradient.flatten() for gradient in gradients])[None]


@pytest.mark.parametrize(("size", "checkpointed"), [(1e-10, False), (1.0, True), (1e8, False)])
def test_lora_gradients_in_float16_are_those_of_float32_for_every_loss(
    model: Model, half: Model, size, checkpointed
):
    expected = lora_gradient(strong_lora(model), size)
    assert relative(lora_gradient(half, size, checkpointed=checkpointed), expected) < ROUNDING


@pytest.mark.parametrize("size", [1e-10, 1e8])
def test_without_scaling_float16_loses_the_gradients(model: Model, half: Model, size, monkeypatch):
    expected = lora_gradient(strong_lora(model), size)
    monkeypatch.setattr(scaling, "safe_scale", torch.ones_like)
    assert relative(lora_gradient(half, size), expected) > 0.1
