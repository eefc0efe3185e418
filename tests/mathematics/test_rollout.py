"""Rollouts against explicit loops and closed forms; noise as a function of seed, iteration and sample."""

import pytest
import torch

from am_diffusers.noise import LatentSpec, draw, generator_for, generators_for
from am_diffusers.rollout import Trajectory, rollout, sample, sample_ode
from am_diffusers.transitions import memoryless_local_linear, ode_euler, shifted_sigmas, uniform_sigmas
from oracles import THREE_MODES, CountingField, float64, gaussian, unconditional

TABLE = memoryless_local_linear(uniform_sigmas(4))


@pytest.fixture
def noises():
    torch.manual_seed(0)
    return torch.randn(5, 3, 2, dtype=torch.float64)


def test_rollout_and_sample_follow_the_table(noises):
    field, cond = CountingField(THREE_MODES.field()), unconditional(3)
    trajectory = rollout(field, TABLE, cond, noises[4], lambda k: noises[k])
    assert field.calls == [1.0, 0.75, 0.5]
    x = noises[4]
    for k in range(4):
        assert torch.equal(trajectory.latents[k], x)
        velocity = THREE_MODES.velocity(x, TABLE.sigmas[k])
        if k < 3:
            assert torch.equal(trajectory.velocities[k], velocity)
        x = TABLE.x_coef[k] * x + TABLE.v_coef[k] * velocity + TABLE.std[k] * noises[k]
    torch.testing.assert_close(sample(field, TABLE, cond, noises[4], lambda k: noises[k]), x)
    assert not trajectory.latents.requires_grad


def test_the_ode_maps_noise_to_data_at_first_order(noises):
    """For Gaussian data the exact map is x_0 -> mean + sqrt(variance) * x_0."""
    law, errors = gaussian(0.4, 0.25, dim=2), []
    for num_steps in (100, 200):
        end = sample(law.field(), ode_euler(uniform_sigmas(num_steps)), unconditional(3), noises[0])
        errors.append((end - (0.4 + 0.5 * noises[0])).abs().max().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)


def test_a_stochastic_table_without_noise_is_an_error(noises):
    with pytest.raises(ValueError, match="step_noise"):
        sample(THREE_MODES.field(), TABLE, unconditional(3), noises[0])


def test_noise_depends_on_seed_iteration_and_sample_only():
    whole = draw(generators_for(1, 2, range(6)), (3, 2))
    parts = [draw(generators_for(1, 2, ids), (3, 2)) for ids in ([0, 1], [2], [3, 4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[0], whole[1])
    for seed, iteration in ((2, 1), (1, 3), (0, 2)):
        assert not torch.isclose(whole, draw(generators_for(seed, iteration, range(6)), (3, 2))).any()
    assert generator_for(1, 23).initial_seed() != generator_for(12, 3).initial_seed()


def test_successive_draws_of_a_sample_differ():
    generators = generators_for(0, 0, [7])
    assert not torch.equal(draw(generators, (4,)), draw(generators, (4,)))


def test_latent_spec_sets_shape_and_precision():
    latents = LatentSpec((3, 2), dtype=torch.float64).draw(generators_for(0, 0, range(4)))
    assert latents.shape == (4, 3, 2)
    assert latents.dtype == torch.float64


def test_a_trajectory_checks_its_shapes(noises):
    latents, velocities = noises[:4], noises[:3]
    Trajectory(latents, velocities, TABLE, unconditional(3))
    for wrong in [
        (noises, velocities, unconditional(3)),
        (latents, noises[:4], unconditional(3)),
        (latents, velocities, unconditional(2)),
    ]:
        with pytest.raises(ValueError, match="Trajectory"):
            Trajectory(wrong[0], wrong[1], TABLE, wrong[2])


def test_the_multistep_ode_is_of_second_order_and_stops_anywhere():
    """Order: halving the step divides the error by 4; one call a step; it may end above sigma = 0."""
    noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for end in (0.0, 0.2):
        ends = {}
        for num_steps in (40, 80, 1280):
            field = CountingField(THREE_MODES.field())
            sigmas = end + (1 - end) * shifted_sigmas(num_steps, 2.0)
            ends[num_steps] = sample_ode(field, sigmas, unconditional(20), noise)
            assert field.calls == sigmas[:-1].tolist()
        errors = [(ends[n] - ends[1280]).square().mean().sqrt().item() for n in (40, 80)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
        euler = sample_ode(THREE_MODES.field(), float64(1.0, end), unconditional(20), noise)
        expected = noise - (1 - end) * THREE_MODES.velocity(noise, 1.0)
        torch.testing.assert_close(euler, expected, rtol=0, atol=1e-12)
