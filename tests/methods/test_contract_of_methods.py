"""What holds for every method: facts, rows, gradients, batch sizes, ranks, states, roll-backs, errors.

A new method needs a row of small settings here.
"""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch

from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.methods.parts.settings import FOR_ALL, SharedSettings
from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.training.state_files import load_state, save_state
from am_diffusers.velocity import CallableField
from methods_around import OFFSET, SHARED, collect, concave, make_method
from ranks import Ranks

SAMPLES, GROUP = 24, 4


@dataclass(frozen=True)
class Row:
    """A method with small settings, on `SAMPLES` samples, `GROUP` of a prompt."""

    method: str
    flags: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    def make(self, policy=OFFSET, *, sizes: dict[str, Any] | None = None, **given):
        flags = {"samples_per_prompt": GROUP} | self.flags | given
        return make_method(self.method, policy, **flags, sizes=Sizes(batch=SAMPLES, **(sizes or {})))


MASKED, CLIPPED = {"mask_quantile": 0.6}, {"reward_clip_quantile": 0.5}
PPS = {"loss_steps": 3, "step_selection": "pps"}
STEPS = {"loss_steps": 4}
ROWS = [
    Row("adjoint_matching", MASKED | STEPS),
    Row("adjoint_matching", {"mask_quantile": None}, "unmasked"),
    Row("adjoint_matching", {"row_weights": "crossfit", "tail_samples": 3} | CLIPPED, "crossfit"),
    Row("adjoint_matching", {"row_weights": "ramp", "iterations": 6} | STEPS, "ramp"),
    Row("adjoint_matching", {"adjoint": "full"} | MASKED | CLIPPED | PPS, "full pps"),
    Row("buffered_adjoint_matching", {"buffer_size": 3 * SAMPLES, "buffer_refresh": 2} | MASKED | STEPS),
    Row("efficient_adjoint_matching", {"eam_ode_steps": 6} | CLIPPED, "stopped"),
    Row("efficient_adjoint_matching", {"eam_ode_steps": 6, "eam_score": "renoised"} | CLIPPED, "renoised"),
    Row("deterministic_adjoint_matching", {"truncate_steps": 3} | MASKED | CLIPPED),
    Row("ram", {"ram_noises": 3}),
    Row("reward_weighted_matching", {"rwm_noises": 3, "rwm_sigma_min": 0.3}),
    Row("draft", {"draft_steps": 2, "rollout_sampler": "memoryless_local_linear"}),
    Row("refl", {"rollout_sampler": "memoryless_local_linear", "refl_last_steps": 3}),
    Row("flow_grpo", {"loss_steps": 2, "grpo_passes": 2}),
]
each_row = pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row.method} {row.title}".strip().replace(" ", "-") for row in ROWS]
)


def run(method, iterations, *, num=SAMPLES, first=0, size=1000):
    """What iterations collect, the sum of their losses, and the numbers that the losses log."""
    found = []
    for iteration in iterations:
        collected = collect(method, num, iteration, first, GROUP)
        parts = [method.loss(part) for part in collected.examples.split(size)]
        numbers = {name: sum(part[1][name] for part in parts) for name in parts[0][1]}
        found.append((collected, sum(part[0].item() for part in parts), numbers))
    return found


def numbers_of(examples) -> dict[str, torch.Tensor]:
    """All tensors of rows."""
    return {name: value for name, value in vars(examples).items() if isinstance(value, torch.Tensor)}


def assert_same(ours, theirs):
    """Bit by bit."""
    for (a, a_loss, a_numbers), (b, b_loss, b_numbers) in zip(ours, theirs, strict=True):
        left, right = numbers_of(a.examples), numbers_of(b.examples)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert a.examples.describe() == b.examples.describe()
        assert torch.equal(a.rewards, b.rewards)
        assert (a_loss, a_numbers, a.metrics) == (b_loss, b_numbers, b.metrics)


# --------------------------------------------------------------------------------------------- facts


def test_every_method_has_a_row_here():
    assert {row.method for row in ROWS} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.__module__ == f"am_diffusers.methods.{name}"
    assert method.title
    assert re.fullmatch(r"\d{4}\.\d{5}", method.paper)
    assert isinstance(method.needs_reward_gradient, bool)
    shared, own = (
        SharedSettings(reward_scale=3.0, samples_per_prompt=8, mask_quantile=None),
        method.Settings(),
    )
    assert "3" in method.law(shared, own)
    assert all(isinstance(text, str) for text in method.cautions(shared, own))
    assert isinstance(method.dearest(own), method.Settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_flags_exist_and_have_a_sentence(name):
    method = METHODS[name]
    own = {field.name for field in fields(method.Settings)}
    assert set(method.reads) <= SHARED | {"offload_trajectories"}
    assert set(FOR_ALL) <= SHARED - set(method.reads)
    assert len(set(method.reads)) == len(method.reads)
    assert {*method.decisive, *method.free} <= own
    assert own & SHARED == set()
    sentences = "".join(kind.__doc__ or "" for kind in method.Settings.__mro__[:-1])
    assert [flag for flag in own if f"    {flag}: " not in sentences] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_flag_that_is_one_of_a_few_words_is_no_other(name):
    settings = METHODS[name].Settings
    for flag, hint in get_type_hints(settings).items():
        if get_origin(hint) is Literal:
            with pytest.raises(ValueError, match=f"--{flag} must be .* or .*, got another"):
                settings(**{flag: "another"})


# ---------------------------------------------------------------------------------- rows and gradients


@each_row
def test_rows_are_finite_and_the_loss_is_differentiable(row):
    shift = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    method = row.make(CallableField(lambda x, sigma, cond: OFFSET(x, sigma, cond) + shift))
    collected = collect(method, SAMPLES, group=GROUP)
    assert len(collected.examples) > 0
    assert all(value.isfinite().all() for value in numbers_of(collected.examples).values())
    assert not any(value.requires_grad for value in numbers_of(collected.examples).values())
    assert collected.rewards.isfinite().all()
    assert collected.examples.weight.shape == (len(collected.examples),)
    assert collected.examples.weight.sum() > 0
    gradients = []
    for size in (1000, 7):
        loss = sum(method.loss(part)[0] for part in collected.examples.split(size))
        gradients.append(torch.autograd.grad(loss, shift)[0])
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


@each_row
def test_iterations_differ_and_repeat(row):
    first, again, second = (run(row.make(), [iteration]) for iteration in (0, 0, 1))
    assert_same(first, again)
    a, b = first[0][0].examples.latents, second[0][0].examples.latents
    assert not torch.isclose(a[: len(b)], b[: len(a)]).any()


@pytest.mark.parametrize("row", [row for row in ROWS if "sigma_jitter" in METHODS[row.method].reads])
def test_a_jittered_grid_is_drawn_from_the_shared_generator(row):
    every = {"loss_steps": "all", "step_selection": "last_and_random", "mask_quantile": None}
    all_steps = every | ({"truncate_steps": None} if "truncate_steps" in row.flags else {})
    sigmas = [
        set(run(row.make(sigma_jitter=0.3, **all_steps), [i])[0][0].examples.sigmas.tolist())
        for i in (0, 0, 1)
    ]
    assert sigmas[0] == sigmas[1]
    assert sigmas[0] & sigmas[2] == {1.0}


# --------------------------------------------------------------------------- batch sizes, ranks, states


@each_row
def test_batch_sizes_change_nothing(row):
    """Groups are cut by chunks of 5, rewards are taken one by one, rows wait on the CPU."""
    whole = run(row.make(), range(3))
    parts = run(row.make(sizes={"rollout": 5, "reward": 1, "offload": True}), range(3), size=7)
    for (ours, ours_loss, ours_numbers), (theirs, loss, numbers) in zip(parts, whole, strict=True):
        a, b = numbers_of(ours.examples), numbers_of(theirs.examples)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.rewards, theirs.rewards, rtol=1e-12, atol=0)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-12)
        assert ours_loss == pytest.approx(loss, rel=1e-12)
        assert ours_numbers == pytest.approx(numbers, rel=1e-12)


@each_row
def test_no_more_samples_are_handled_at_once_than_sizes_allow(row):
    scored, called = [], []

    def reward(x, prompts):
        scored.append(len(x))
        return concave(x, prompts)

    def velocity(x, sigma, cond):
        called.append(len(x))
        return OFFSET(x, sigma, cond)

    method = row.make(CallableField(velocity), sizes={"rollout": 5, "reward": 3}, reward=reward)
    examples = collect(method, SAMPLES, group=GROUP).examples
    assert max(called, default=5) == 5
    for part in examples.split(1000):
        method.loss(part)
    assert max(scored) == 3


@each_row
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_together_equal_one_process(row, num_ranks):
    """All have as many rows, so that all make the same number of backward passes."""
    method, share = row.make(), SAMPLES // num_ranks
    whole, state = run(method, range(3)), method.state_dict()

    def on_rank(rank, gather):
        own = row.make(gather=gather)
        return run(own, range(3), num=share, first=rank * share), own.state_dict()

    ranks = Ranks(num_ranks).run(on_rank)
    for iteration, (expected, loss, numbers) in enumerate(whole):
        found = [results[iteration] for results, _ in ranks]
        assert sum(each[1] for each in found) == pytest.approx(loss, rel=1e-12)
        for name, number in numbers.items():
            assert sum(each[2][name] for each in found) == pytest.approx(number, rel=1e-12)
        rewards = torch.cat([each[0].rewards for each in found])
        torch.testing.assert_close(rewards, expected.rewards, rtol=1e-12, atol=0)
        assert len({len(each[0].examples) for each in found}) == 1
        assert len(found[0][0].examples) * num_ranks >= len(expected.examples)
        for collected, *_ in found:
            assert collected.metrics == pytest.approx(expected.metrics, rel=1e-9)
    for _, rank_state in ranks:
        assert flat(rank_state) == pytest.approx(flat(state), rel=1e-12)


def flat(state: Any, name: str = "") -> dict[str, float]:
    """Numbers of a state by their path; a text is part of the path."""
    if isinstance(state, dict):
        return {key: value for k, v in state.items() for key, value in flat(v, f"{name}/{k}").items()}
    return {name: state} if isinstance(state, (int, float)) else {f"{name} {state}": 0.0}


@each_row
def test_the_state_continues_a_run(row, tmp_path):
    """What is the same on all ranks goes through JSON, what isn't through a checkpoint's files."""
    method, resumed, fresh = row.make(), row.make(), row.make()
    run(method, range(3))
    save_state(tmp_path, "local", method.local_state_dict())
    resumed.load_state_dict(json.loads(json.dumps(method.state_dict())))
    resumed.load_local_state_dicts([load_state(tmp_path, "local")], PartShare())
    assert resumed.state_dict() == method.state_dict()
    expected = run(method, range(3, 6))
    assert_same(run(resumed, range(3, 6)), expected)
    assert resumed.state_dict() == method.state_dict()
    if method.state_dict():
        loss = run(fresh, [3])[0][1]
        assert row.title == "unmasked" or loss != expected[0][1]  # without a mask it only warns by its state
        assert fresh.state_dict() != method.state_dict()


@each_row
def test_a_roll_back_brings_the_method_back(row):
    method = row.make()
    run(method, range(3))
    state, roll_back = json.dumps(method.state_dict()), method.snapshot()
    expected = run(method, [3, 4, 5])
    roll_back(None)
    assert json.dumps(method.state_dict()) == state
    assert_same(run(method, [3, 4, 5]), expected)


# --------------------------------------------------------------------------------------------- rewards


@each_row
def test_a_reward_that_is_not_a_number_stops_the_iteration_and_names_the_prompt(row):
    def broken(x, prompts):
        return x.sum(1) / torch.tensor([float(p != "prompt 2") for p in prompts])

    with pytest.raises(NonFiniteError, match="prompt 2"):
        run(row.make(reward=broken), [0])


@each_row
def test_a_reward_has_a_gradient_only_where_the_method_says_so(row):
    seen = []

    def detached(x, prompts):
        seen.append(torch.is_grad_enabled() and x.requires_grad)
        return torch.round(concave(x, prompts), decimals=1).detach()

    method = row.make(reward=detached)
    if method.needs_reward_gradient:
        with pytest.raises(ValueError, match="use a reward with `differentiable = True`"):
            run(method, [0])
    else:
        run(method, [0])
    assert set(seen) == {method.needs_reward_gradient}


@pytest.mark.parametrize("row", [row for row in ROWS if METHODS[row.method].compares_samples])
def test_methods_that_compare_samples_want_two_of_a_prompt(row):
    with pytest.raises(ValueError, match="set samples_per_prompt to 2 or more, got 1"):
        run(row.make(samples_per_prompt=1), [0])
    with pytest.raises(ValueError, match="groups of 4 neighbouring samples"):
        run(row.make(), [0], num=6)
