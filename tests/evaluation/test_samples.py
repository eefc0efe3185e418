"""Pictures by stochastic solvers: the noise of each is its own, whatever the batch and the model."""

from dataclasses import replace

import pytest
import torch

from am_diffusers.evaluation.images import image_ids
from am_diffusers.noise import generator_for
from am_diffusers.rollout import Solution, TableSolver
from am_diffusers.transitions import memoryless_local_linear, ode_euler, uniform_sigmas
from analytic_pictures import PROMPTS, field, make_sampler

WHICH = image_ids(3, 3)


def stochastic(batch_size=4, seed=3):
    table = memoryless_local_linear(uniform_sigmas(5))
    return replace(make_sampler(batch_size, seed), solver=TableSolver(table))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_stochastic_pictures_and_path_kl_do_not_depend_on_the_batch(batch_size):
    whole = stochastic(9).sample(field(0.1), PROMPTS, WHICH, base=field(0.0))
    parts = stochastic(batch_size).sample(field(0.1), PROMPTS, WHICH, base=field(0.0))
    torch.testing.assert_close(parts.images, whole.images)
    torch.testing.assert_close(parts.path_kl, whole.path_kl)
    assert whole.path_kl.shape == (9,)
    assert (whole.path_kl > 0).all()
    some = stochastic().sample(field(0.1), PROMPTS, [WHICH[7], WHICH[2]], base=field(0.0))
    torch.testing.assert_close(some.images, whole.images[[7, 2]])
    torch.testing.assert_close(some.path_kl, whole.path_kl[[7, 2]])


def test_path_kl_is_taken_only_against_a_base():
    assert stochastic().sample(field(0.1), PROMPTS, WHICH[:2]).path_kl is None
    assert make_sampler().sample(field(0.1), PROMPTS, WHICH[:2], base=field(0.0)).path_kl is None


class Recording:
    """A solver that returns the starting noise and keeps what its generators draw."""

    def __init__(self):
        self.drawn = []

    def __call__(self, field, cond, noise, generators, *, base=None):
        self.drawn.extend(torch.randn(2, generator=generator) for generator in generators)
        return Solution(noise, None)


def test_step_noise_is_a_function_of_seed_purpose_and_picture_apart_from_the_starting_noise():
    recording = Recording()
    sampler = replace(make_sampler(), solver=recording, decode=lambda latents: latents)
    starts = sampler.images(field(0.0), PROMPTS, WHICH)
    steps = torch.stack(recording.drawn)
    for picture, start, step in zip(WHICH, starts, steps, strict=True):
        own = generator_for(3, "picture", picture.prompt, picture.image)
        assert torch.equal(start, torch.randn(start.shape, generator=own)), "as ever"
        of_steps = generator_for(3, "picture", picture.prompt, picture.image, "steps")
        assert torch.equal(step, torch.randn(2, generator=of_steps))
    again = Recording()
    replace(sampler, solver=again, batch_size=9).images(field(0.2), PROMPTS, WHICH)
    assert torch.equal(torch.stack(again.drawn), steps), "another model, the same noise"
    for other in (replace(sampler, seed=4), replace(sampler, purpose="divergence")):
        again = Recording()
        replace(other, solver=again).images(field(0.0), PROMPTS, WHICH)
        assert not torch.isclose(torch.stack(again.drawn), steps).any()
    assert len({tuple(step.tolist()) for step in steps}) == len(WHICH)


def test_the_noise_of_steps_does_not_change_what_the_ode_draws():
    sampler, (one,) = make_sampler(1), WHICH[4:5]
    cond = sampler.encode([PROMPTS[one.prompt]])
    noise = sampler.latents.draw([generator_for(3, "picture", *one)])
    table, x = ode_euler(uniform_sigmas(5)), noise
    for k in range(5):
        x = table.mean(k, x, field(0.0)(x, x.new_full((1,), table.sigmas[k].item()), cond))
    assert torch.equal(sampler.images(field(0.0), PROMPTS, [one]), x.clamp(0, 1))
