"""Schedulers of Diffusers as solvers: against the pipeline, and the closed form of a Gaussian law."""

import diffusers
import pytest
import torch

from am_diffusers.models.base import Model
from am_diffusers.models.schedulers import SCHEDULERS, SchedulerSolver, make_solver
from am_diffusers.models.sd3 import SD3
from am_diffusers.noise import draw, generators_for
from am_diffusers.rollout import TableSolver
from am_diffusers.transitions import TRANSITIONS
from am_diffusers.velocity import CallableField, GuidedField
from conftest import tiny_pipeline
from families import PROMPTS, strong_lora
from oracles import CountingField, gaussian, unconditional

OWN = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
STOCHASTIC = {"FlowMatchLCMScheduler"}
DETERMINISTIC = sorted(SCHEDULERS.keys() - STOCHASTIC)


def run(solver, field, num=4, dim=3, seed=0):
    noise = draw(generators_for(seed, 0, range(num)), (dim,))
    return solver(field, unconditional(num), noise, generators_for(seed, 1, range(num))).latents, noise


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_scheduler_gives_the_pipelines_picture(model: Model, name: str, guidance_scale: float) -> None:
    strong_lora(model)
    # The pipeline gives its scheduler no generators: both draw from torch's own, one row in the same order.
    prompts = PROMPTS[:1] if name in STOCHASTIC else PROMPTS
    generators = [torch.default_generator] * len(prompts)
    noise = torch.randn(len(prompts), *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    solver = model.solver(name, 4, noise.shape[1:])
    cond = model.encode_prompts(prompts, max_sequence_length=8, negative_prompt="green")
    field = GuidedField(model.policy, guidance_scale) if guidance_scale > 1 else model.policy
    torch.manual_seed(0)
    images = model.decode(solver(field, cond, noise, generators).latents)
    pipe = model.pipeline()
    assert isinstance(solver, SchedulerSolver)
    pipe.scheduler = solver.scheduler
    torch.manual_seed(0)
    expected = pipe(
        prompts,
        negative_prompt=["green"] * len(prompts),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        max_sequence_length=8,
        output_type="pt",
    ).images
    assert (images - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    assert type(solver.scheduler).__name__ == name


def test_the_pipelines_euler_scheduler_is_the_ode_table(model: Model) -> None:
    noise = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    table, scheduler = (
        model.solver(name, 5, noise.shape[1:])(model.base, cond, noise, []).latents
        for name in ("ode_euler", "FlowMatchEulerDiscreteScheduler")
    )
    torch.testing.assert_close(table, scheduler, atol=1e-5, rtol=1e-5)
    assert table.std() > 0.1


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_deterministic_scheduler_tends_to_the_exact_ode(name: str, shift: float) -> None:
    """Noise x goes to mean + sqrt(variance) x; Euler's error is .2 at 20 steps, those of order 2 are less."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    law, errors = gaussian(0.7, 0.36, dim=3), []
    for num_steps in (20, 160):
        end, noise = run(make_solver(own, name, num_steps), law.field(), num=200)
        errors.append((end - (0.7 + 0.6 * noise)).abs().mean().item())
    assert errors[1] < 0.012
    assert errors[0] / errors[1] > 3


def test_a_stochastic_scheduler_draws_a_rows_noise_from_its_own_generator() -> None:
    field = gaussian(0.7, 0.36, dim=3).field()
    solver = make_solver(OWN, "FlowMatchLCMScheduler", 4)
    whole, noise = run(solver, field)
    generators = generators_for(0, 1, range(4))
    parts = [solver(field, unconditional(1), noise[i : i + 1], generators[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    other = solver(field, unconditional(4), noise, generators_for(0, 2, range(4))).latents
    assert not torch.isclose(other, whole).all(1).any()


def test_the_pipelines_own_scheduler_keeps_its_settings() -> None:
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    field = CountingField(gaussian(0.7, 0.36, dim=3).field())
    solver = make_solver(own, "FlowMatchEulerDiscreteScheduler", 5)
    run(solver, field)
    assert len(own.timesteps) == 1000, "the pipeline's scheduler is not touched"
    own.set_timesteps(5)
    assert field.calls == pytest.approx(own.sigmas[:-1].tolist(), abs=1e-6)
    first = list(field.calls)
    run(solver, field)
    assert field.calls == first * 2, "a call leaves nothing behind"


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_schedulers_get_the_pipelines_shift(name: str) -> None:
    """Up to the different ends of their grids and rounded timesteps."""
    calls = []
    for shift in (1.0, 3.0):
        field = CountingField(gaussian(0.7, 0.36, dim=3).field())
        run(make_solver(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), name, 10), field)
        calls.append(torch.tensor(field.calls))
    torch.testing.assert_close(calls[1], 3 * calls[0] / (1 + 2 * calls[0]), atol=0.03, rtol=0)
    assert (calls[1] - calls[0]).max() > 0.2


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_diffusers_has_nothing_to_warn_about(name: str, caplog: pytest.LogCaptureFixture) -> None:
    diffusers.utils.logging.enable_propagation()
    try:
        run(make_solver(OWN, name, 5), gaussian(0.7, 0.36, dim=3).field())
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not caplog.records


def test_a_scheduler_of_order_two_makes_two_calls_a_step_but_one_in_the_last() -> None:
    field = CountingField(gaussian(0.7, 0.36, dim=3).field())
    run(make_solver(OWN, "FlowMatchHeunDiscreteScheduler", 6), field)
    assert len(field.calls) == 11


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 400])
def test_few_and_many_steps(name: str, num_steps: int) -> None:
    """At 400 steps the first two rounded timesteps are the same."""
    field = CountingField(gaussian(0.7, 0.36, dim=3).field())
    end, _ = run(make_solver(OWN, name, num_steps), field)
    assert end.isfinite().all()
    assert field.calls[0] == pytest.approx(1, abs=2e-3)
    assert len(field.calls) == (2 * num_steps - 1 if name == "FlowMatchHeunDiscreteScheduler" else num_steps)


def test_base_and_path_kl_are_left_out() -> None:
    field = gaussian(0.7, 0.36, dim=3).field()

    def never(x, sigma, cond):
        raise AssertionError("no density, no path KL")

    solver, noise = make_solver(OWN, "UniPCMultistepScheduler", 4), torch.zeros(1, 3)
    assert solver(field, unconditional(1), noise, [], base=CallableField(never)).path_kl is None


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_unfit_schedulers_stop_above_zero(name: str) -> None:
    """Why they are left out: noise of the last level stays in the picture. Once this fails, take them in."""
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] > 0.2
    with pytest.raises(ValueError, match=f"{name}' isn't fit for flow models.*UniPCMultistepScheduler"):
        make_solver(OWN, name, 4)


def test_what_cannot_be_made_is_named(model: Model) -> None:
    with pytest.raises(ValueError, match=r"'Euler' is unknown.*ode_euler, .*FlowMatchEulerDiscreteScheduler"):
        model.solver("Euler", 4, (8, 16, 16))
    with pytest.raises(ValueError, match=r"steps of the sampler \w+: expected at least 1, got 0"):
        model.solver("ode_euler", 0, (8, 16, 16))


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
def test_tables_get_the_noise_levels_that_suit_them(name: str) -> None:
    model = Model(tiny_pipeline(), SD3)
    shape = model.latent_shape(64, 64)
    solver = model.solver(name, 5, shape)
    assert isinstance(solver, TableSolver)
    sigmas = (model.ode_sigmas if name == "ode_euler" else model.sde_sigmas)(5, shape)
    assert torch.equal(solver.transitions.sigmas, sigmas)
    assert torch.equal(solver.transitions.v_coef, TRANSITIONS[name](sigmas).v_coef)
