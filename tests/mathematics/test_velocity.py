"""Conditioning, autograd fields and guidance."""

import pytest
import torch

from am_diffusers.velocity import CallableField, Conditioning, GuidedField
from oracles import THREE_MODES, unconditional
from pull_backs import vjp

FIELD = CallableField(
    lambda x, sigma, cond: torch.sin(x * cond.pooled.sum(1)[:, None]) + sigma[:, None] * x.flip(1)
)


@pytest.fixture
def cond():
    torch.manual_seed(0)
    pooled, negative = torch.randn(2, 5, 3, dtype=torch.float64)
    return Conditioning(tuple("abcde"), pooled=pooled, negative_embeddings=negative, negative_pooled=negative)


@pytest.fixture
def point():
    torch.manual_seed(1)
    return torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64)


def autograd_vjp(field, x, sigma, cond, cotangent):
    x = x.clone().requires_grad_(True)
    velocity = field(x, sigma, cond)
    return velocity.detach(), torch.autograd.grad(velocity, x, cotangent(velocity.detach()))[0]


@pytest.mark.parametrize("field", [FIELD, GuidedField(FIELD, 2.5), GuidedField(FIELD, 1.0)])
def test_vjp_equals_autograd_also_with_a_cotangent_that_needs_the_velocity(field, cond, point):
    def cotangent(velocity):
        return velocity.cos()

    expected = autograd_vjp(field, *point, cond, cotangent)
    with torch.no_grad():
        got = vjp(field, *point, cond, cotangent)
        constant = vjp(field, *point, cond, cotangent(expected[0]))
    for a, b, c in zip(got, expected, constant, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(c, b, rtol=0, atol=1e-12)
        assert not a.requires_grad


def test_guidance_scale_1_is_the_field_and_0_its_negative(cond, point):
    field = FIELD(*point, cond)
    torch.testing.assert_close(GuidedField(FIELD, 1.0)(*point, cond), field, rtol=0, atol=1e-12)
    torch.testing.assert_close(GuidedField(FIELD, 0.0)(*point, cond), FIELD(*point, cond.negative()))
    assert not torch.allclose(GuidedField(FIELD, 3.0)(*point, cond), field)


def test_a_field_that_ignores_its_state_has_a_zero_vjp(point):
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    field = CallableField(lambda x, sigma, cond: weight.expand_as(x))
    _, gradient = vjp(field, *point, unconditional(5), torch.ones_like(point[0]))
    assert torch.equal(gradient, torch.zeros_like(point[0]))


def test_velocity_keeps_the_graph_of_the_parameters(point):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    field = CallableField(lambda x, sigma, cond: weight * THREE_MODES.velocity(x, sigma))
    field(*point, unconditional(5)).sum().backward()
    assert weight.grad is not None


def test_conditioning_rows(cond):
    rows = cond.index([3, 0, 3])
    assert rows.prompts == ("d", "a", "d")
    assert torch.equal(rows.pooled, cond.pooled[[3, 0, 3]])
    assert torch.equal(rows.negative().pooled, cond.negative_pooled[[3, 0, 3]])
    assert rows.embeddings is None


def test_conditioning_mistakes_are_named():
    with pytest.raises(ValueError, match=r"Conditioning.pooled: 3 rows for 2 prompts"):
        Conditioning(("a", "b"), pooled=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="negative_prompt"):
        unconditional(2).negative()
