"""Gradients in noise, embeddings and parameters: the sampler differentiated, against autograd through it."""

import pytest
import torch

from am_diffusers.adjoint_tables import memoryless_form, velocity_form
from am_diffusers.input_gradients import Recorded, continuous_gradients, exact_gradients, record
from am_diffusers.rollout import noise_level, sample
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.transitions import TRANSITIONS, ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning, GuidedField
from oracles import THREE_MODES, CountingField, gaussian, unconditional

TARGET = torch.tensor([0.5, -0.3], dtype=torch.float64)


def moved(law):
    """Field of a law whose points are moved by the pooled embedding, times a parameter."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def velocity(x, sigma, cond):
        move = weight * (cond.pooled + (0 if cond.embeddings is None else cond.embeddings.sin().sum(1)))
        return law.velocity(x - (1 - sigma)[:, None] * move, sigma) - move

    return CallableField(velocity), weight


def inputs(num=5, dim=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(num, *shape, generator=generator, dtype=torch.float64)

    embeddings, negative = draw(3, dim), draw(3, dim)
    cond = Conditioning(
        tuple("abcdefgh"[:num]),
        embeddings=embeddings,
        pooled=0.5 * draw(dim),
        negative_embeddings=negative,
        negative_pooled=draw(dim),
    )
    return draw(dim), cond, [draw(dim) for _ in range(12)]


def cost(final):
    return (final - TARGET).square().sum() / 2


def autograd(field, table, cond, noise, step_noise, parameters):
    """Gradients by autograd through all steps."""
    leaves = [value.clone().requires_grad_() for value in (noise, cond.embeddings, cond.pooled)]
    tracked = Conditioning(
        cond.prompts, leaves[1], leaves[2], None, cond.negative_embeddings, cond.negative_pooled
    )
    x = leaves[0]
    for k in range(table.num_steps):
        x = table.step(k, x, field(x, noise_level(table, k, x), tracked), step_noise(k))
    return torch.autograd.grad(cost(x), [*leaves, *parameters])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("table", TRANSITIONS)
def test_exact_gradients_are_autograd_through_the_sampler(table, guidance_scale):
    field, weight = moved(THREE_MODES)
    field = field if guidance_scale == 1 else GuidedField(field, guidance_scale)
    noise, cond, step_noise = inputs()
    transitions = TRANSITIONS[table](uniform_sigmas(6))
    recorded = record(field, transitions, cond, noise, step_noise.__getitem__)
    assert torch.equal(recorded.final, sample(field, transitions, cond, noise, step_noise.__getitem__))
    got = exact_gradients(field, recorded, transitions, recorded.final - TARGET, [weight])
    expected = autograd(field, transitions, cond, noise, step_noise.__getitem__, [weight])
    found = (got.latents, got.embeddings, got.pooled, *got.parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    # The start of a memoryless sampler doesn't matter.
    assert all(gradient.abs().max() > 0.01 for gradient in expected[table != "ode_euler" :])
    assert weight.grad is None


def test_the_jacobian_at_the_cleaner_state_is_not_the_samplers():
    field, weight = moved(THREE_MODES)
    noise, cond, step_noise = inputs()
    transitions = ode_euler(uniform_sigmas(6))
    recorded = record(field, transitions, cond, noise)
    wrong = Recorded(recorded.states.roll(-1, 0), recorded.sigmas.roll(-1, 0), cond)
    got = exact_gradients(field, wrong, transitions, recorded.final - TARGET)
    expected, *_ = autograd(field, transitions, cond, noise, step_noise.__getitem__, [weight])
    assert (got.latents - expected).norm() > 0.1 * expected.norm()


def test_embeddings_through_both_branches_of_guidance_are_wrong():
    """The negative prompt is no input: its own embeddings' gradient isn't that of the prompt."""
    field, _ = moved(THREE_MODES)
    guided, (noise, cond, _) = GuidedField(field, 3.5), inputs()
    sigma, cotangent = torch.full((5,), 0.4, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
    _, got = guided.input_vjp(noise, sigma, cond, cotangent)
    _, below = field.input_vjp(noise, sigma, cond.negative(), -2.5 * cotangent)
    leaf = cond.pooled.clone().requires_grad_()
    velocity = guided(
        noise,
        sigma,
        Conditioning(
            cond.prompts, cond.embeddings, leaf, None, *(cond.negative_embeddings, cond.negative_pooled)
        ),
    )
    (expected,) = torch.autograd.grad(velocity, leaf, cotangent)
    torch.testing.assert_close(got.pooled, expected, rtol=0, atol=1e-12)
    assert (got.pooled + below.pooled - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_a_gaussian_flow_is_known(order):
    """Clean = z + s noise: dL/dnoise = (clean - y) s and dL/dz = clean - y."""
    field, weight = moved(gaussian(0.0, 0.09, 2))
    noise, cond, _ = inputs()
    transitions = ode_euler(uniform_sigmas(100))
    pooled = Conditioning(cond.prompts, pooled=cond.pooled)
    recorded = record(field, transitions, pooled, noise)
    adjoint = recorded.final - TARGET
    assert cond.pooled is not None
    torch.testing.assert_close(recorded.final, weight.item() * cond.pooled + 0.3 * noise, rtol=0, atol=0.05)
    for got in (
        exact_gradients(field, recorded, transitions, adjoint),
        continuous_gradients(field, recorded, velocity_form(recorded.sigmas.flip(0)), adjoint, order),
    ):
        torch.testing.assert_close(got.latents, 0.3 * adjoint, rtol=0.04, atol=1e-3)
        torch.testing.assert_close(got.pooled, weight.item() * adjoint, rtol=0.04, atol=1e-3)
        assert got.embeddings is None


@pytest.mark.parametrize("table", ["memoryless_local_linear", "ancestral"])
def test_the_start_of_a_memoryless_sampler_does_not_move_its_end(table):
    field, _ = moved(THREE_MODES)
    noise, cond, step_noise = inputs()
    transitions = TRANSITIONS[table](uniform_sigmas(12))
    recorded = record(field, transitions, cond, noise, step_noise.__getitem__)
    adjoint = recorded.final - TARGET
    got = exact_gradients(field, recorded, transitions, adjoint)
    assert got.latents.norm() < 0.02 * adjoint.norm()
    assert got.pooled is not None
    assert got.pooled.norm() > 0.1 * adjoint.norm()
    table = memoryless_form(recorded.sigmas.flip(0))
    assert continuous_gradients(field, recorded, table, adjoint, 1).latents.norm() == 0


def test_mistakes_are_named():
    field, _ = moved(THREE_MODES)
    noise, cond, _ = inputs()
    transitions = ode_euler(uniform_sigmas(6))
    recorded = record(field, transitions, cond, noise)
    assert recorded.some(3).sigmas.tolist() == recorded.sigmas[::2].tolist()
    assert torch.equal(recorded.some(3).states, recorded.states[::2])
    with pytest.raises(ValueError, match="1 to 6 steps of the gradient"):
        recorded.some(7)
    with pytest.raises(ValueError, match="the sigmas that were recorded"):
        continuous_gradients(field, recorded, velocity_form(torch.linspace(0, 1, 7)), noise, 1)
    table = velocity_form(recorded.sigmas.flip(0))
    with pytest.raises(ValueError, match="order 1 or 2"):
        continuous_gradients(field, recorded, table, noise, 3)
    with pytest.raises(ValueError, match="3 sigmas and 5 samples"):
        Recorded(recorded.states, recorded.sigmas[:3], cond)
    with pytest.raises(ValueError, match="increase strictly"):
        velocity_form(recorded.sigmas)


def test_a_gradient_that_is_not_finite_stops_with_step_and_prompt():
    def velocity(x, sigma, cond):
        bad = (sigma < 0.5)[:, None] & (torch.arange(len(x)) == 1)[:, None]
        return x * torch.where(bad, float("inf"), 1.0).to(x)

    noise, _, _ = inputs()
    transitions = ode_euler(uniform_sigmas(4))
    smooth = record(CallableField(lambda x, sigma, cond: x), transitions, unconditional(5), noise)
    with pytest.raises(NonFiniteError, match=r"latents at step 3 \(sigma 0.2500\) .* \['prompt 1'\]"):
        exact_gradients(CallableField(velocity), smooth, transitions, noise)
    table = velocity_form(smooth.sigmas.flip(0))
    with pytest.raises(NonFiniteError, match=r"latents at step 4 \(sigma 0.0000\)"):
        continuous_gradients(CallableField(velocity), smooth, table, noise, 2)


def test_a_continuous_gradient_makes_as_many_passes_as_it_has_steps():
    @torch.no_grad()
    def passes(order):
        field = CountingField(moved(THREE_MODES)[0])
        noise, cond, _ = inputs()
        recorded = record(field, ode_euler(uniform_sigmas(20)), cond, noise).some(5)
        table = velocity_form(recorded.sigmas.flip(0))
        continuous_gradients(field, recorded, table, noise, order)
        return len(field.calls), [round(sigma, 6) for sigma in field.vjps]

    assert passes(1) == passes(2) == (20, [0.0, 0.2, 0.4, 0.6, 0.8])
