"""The benchmark against known tilts: measures, laws, every method by its real class, records, the page."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench_oracles
from am_diffusers.methods import METHODS
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from benching.oracles import records as oracle_records
from benching.oracles import variants as oracle_variants
from benching.oracles.figure import write_figure
from benching.oracles.laws import law_of, points_of, quantiles_of_noise, sde_on_a_line
from benching.oracles.measures import Points, distance, measures, wasserstein2
from benching.oracles.problems import PROBLEMS
from benching.oracles.records import REFERENCES, Key, density, ensure, load, settings_of
from benching.oracles.tables import BEGIN, END, SEEDS, render, replace_block
from benching.oracles.training import Schedule, control, reaches, train
from benching.oracles.variants import VARIANTS, Variant
from oracles import chain_moments, float64, gaussian

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
LINE, PLANE = PROBLEMS["two_modes_quadratic"], PROBLEMS["five_modes"]
TINY = Variant("tiny", "adjoint_matching", {"num_inference_steps": 4}, schedule=Schedule(2, 8))


# ---------------------------------------------------------------------------------------------- measures


def test_the_distance_of_two_gaussians():
    """W2^2 = (difference of means)^2 + (difference of stds)^2; quantiles make it exact but for the tails."""
    z, fine = quantiles_of_noise()[:, 0], torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = (-0.5 * fine**2).softmax(0)
    found = wasserstein2(0.3 + 0.5 * z, torch.full_like(z, 1 / len(z)), -0.2 + 1.5 * fine, weight)
    assert found == pytest.approx(math.hypot(0.5, 1.0), rel=2e-3)


def test_the_distance_of_a_few_points_by_hand():
    """.25 of the mass moves from 0 to 1 and .25 from 1 to 3, in any order of the points."""
    a, b = float64(1.0, 0.0), float64(3.0, 0.0, 1.0)
    found = wasserstein2(a, float64(0.5, 0.5), b, float64(0.25, 0.25, 0.5))
    assert found == pytest.approx(math.sqrt(0.25 * 1 + 0.25 * 4), rel=1e-12)


def test_the_sliced_distance_of_a_shift_is_its_length_by_root_two():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = Points.equal(x), Points.equal(x + float64(0.6, -0.8))
    assert distance(a, b) == pytest.approx(1 / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_law_has_no_distance_from_itself_and_a_known_one_from_another(problem):
    """On a line by quadrature (1e-6); in the plane four standard errors of 20,000 points."""
    tilt, law = problem.tilt(), problem.law
    same = measures(points_of(tilt, 0), tilt, points_of(tilt, 0), problem)
    size = 1e-6 if problem.dim == 1 else 0.04
    assert same["w2"] == 0
    assert all(abs(value) < size for value in same.values())
    other = measures(points_of(law, 1), tilt, points_of(tilt, 0), problem)
    assert other["reward_gain"] == pytest.approx(
        problem.mean_reward(law) - problem.mean_reward(tilt), abs=size
    )
    shift = law.mean() - tilt.mean()
    expected = shift.item() if problem.dim == 1 else shift.norm().item()
    assert other["mean_bias"] == pytest.approx(expected, abs=size)
    spread = (law.covariance().trace() / tilt.covariance().trace()).sqrt().item()
    assert other["spread_bias"] == pytest.approx(spread - 1, abs=size)
    assert other["w2"] > 0.3
    assert other["mode_error"] > 0.2


def test_all_mass_in_one_mode_is_in_the_wrong_ones_but_for_its_share():
    """The modes are so far apart that their middles belong to one each, to 1e-4."""
    tilt = PLANE.tilt()
    found = measures(Points.equal(tilt.means[1:2]), tilt, points_of(tilt, 0), PLANE)
    assert found["mode_error"] == pytest.approx(1 - tilt.weights[1].item(), abs=1e-4)
    assert found["spread_bias"] == -1


def test_the_tilt_is_the_base_times_the_exponential_reward():
    """Densities at points of the line, up to one constant."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    constants = LINE.tilt().log_density(x, 0.0) - LINE.law.log_density(x, 0.0) - LINE.reward(x)
    torch.testing.assert_close(constants, constants[:1].expand(9), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "expected"), list(zip(PROBLEMS, (0.95, 0.8, 0.65), strict=True)))
def test_rewards_deviate_under_the_base_as_the_page_says(name, expected):
    """To .02: the page rounds, and 20,000 points have a standard error of .005."""
    problem = PROBLEMS[name]
    law = points_of(problem.law, 0)
    rewards = problem.reward(law.x)
    variance = law.weight @ (rewards - law.weight @ rewards).square()
    assert math.sqrt(variance.item()) == pytest.approx(expected, abs=0.02)


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="did training diverge"):
        Points.equal(float64(0.0, math.nan)[:, None])


# -------------------------------------------------------------------------------------------------- laws


def test_the_chain_on_the_grid_has_the_moments_of_the_chain_of_gaussians():
    """Exact but for the truncated noise and the grid: N(.3, .5) by 20 steps, whose start is N(0, 1)."""
    law, table = gaussian(0.3, 0.5), memoryless_local_linear(uniform_sigmas(20))
    found = sde_on_a_line(law.field(), table)
    gain, variance = chain_moments(table, law)
    assert found.spread() == pytest.approx(math.sqrt(variance + gain**2), rel=1e-4)
    assert found.weight.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_velocity_of_the_tilt_samples_it(problem, sampler):
    """W2 .03 holds the discretisation of 64 steps and, in the plane, the floor of 20,000 samples, .012."""
    law = law_of(problem.tilt().field(), problem.dim, sampler, 0)
    assert distance(law, points_of(problem.tilt(), 1)) < 0.03
    assert distance(law, points_of(problem.law, 1)) > 0.3


def test_the_kept_density_is_that_of_the_law():
    heights = torch.tensor(density(points_of(LINE.tilt(), 0)), dtype=torch.float64)
    edges = oracle_records.BIN_EDGES
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    torch.testing.assert_close(heights, LINE.tilt().log_density(middle, 0.0).exp(), rtol=0, atol=0.01)


# --------------------------------------------------------------------------------------------- the methods


def test_every_method_has_a_row():
    assert {variant.method for variant in VARIANTS.values()} == set(METHODS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_trains_by_the_class_of_its_method(name):
    """Two iterations of 16 samples in the plane move the field, and leave numbers."""
    variant = replace(VARIANTS[name], schedule=Schedule(2, 16))
    field, parameters = control(PLANE.law, 0)
    x, sigma = torch.ones(1, 2, dtype=torch.float64), float64(0.5)
    before = field(x, sigma, None).detach()
    torch.testing.assert_close(before, PLANE.law.velocity(x, sigma), rtol=0, atol=0)
    method = variant.make(field, PLANE)
    assert type(method) is METHODS[variant.method]
    assert train(method, parameters, variant.schedule, seed=0, done=lambda: False) == 2
    after = field(x, sigma, None).detach()
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4


def test_training_ends_at_the_reward_of_the_tilt():
    variant = replace(VARIANTS["draft_20_stopped"], schedule=Schedule(200, 32, 0.003, until_reward=True))
    field, parameters = control(LINE.law, 0)
    reached = reaches(field, LINE)
    assert not reached()
    method = variant.make(field, LINE)
    made = train(method, parameters, variant.schedule, seed=0, done=reached)
    assert 2 < made < 100
    assert reached()


# --------------------------------------------------------------------------------------------------- records


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(oracle_variants.VARIANTS, "tiny", TINY)
    return Key("two_modes_linear", "tiny", 0)


def test_a_result_is_kept_until_a_setting_changes(tmp_path, tiny, monkeypatch):
    assert ensure(tiny, tmp_path) == "new"
    first = load(tiny, tmp_path)
    assert first["iterations"] == 2
    assert set(first["found"]) == {"sde", "ode"}
    assert first["found"]["ode"]["w2"] == pytest.approx(1.1, abs=0.2)  # hardly trained
    tiny.file(tmp_path).write_text(json.dumps(first | {"mark": 1}))
    assert ensure(tiny, tmp_path) == "kept"
    assert "mark" in load(tiny, tmp_path)
    monkeypatch.setitem(oracle_variants.VARIANTS, "tiny", replace(TINY, title="another title"))
    assert ensure(tiny, tmp_path) == "kept"
    masked = replace(TINY, shared=TINY.shared | {"mask_quantile": 0.8})
    monkeypatch.setitem(oracle_variants.VARIANTS, "tiny", masked)
    assert ensure(tiny, tmp_path) == "settings changed"
    assert "mark" not in load(tiny, tmp_path)
    assert list(tmp_path.rglob("*.json")) == [tiny.file(tmp_path)]


def test_a_changed_default_of_a_method_is_a_changed_setting(tiny):
    method = settings_of(tiny)["method"]
    assert method["pairing"] == "right"
    assert method["tail_samples"] == 4


def test_one_that_begins_at_the_tilt_begins_there(tmp_path, tiny, monkeypatch):
    still = replace(TINY, schedule=Schedule(1, 8, 0.0, from_tilt=True))
    monkeypatch.setitem(oracle_variants.VARIANTS, "tiny", still)
    ensure(tiny, tmp_path)
    assert load(tiny, tmp_path)["found"]["ode"]["w2"] < 0.01


def test_one_that_diverges_is_called_so(tmp_path, tiny, monkeypatch):
    wild = replace(TINY, schedule=Schedule(3, 8, 1e6))
    monkeypatch.setitem(oracle_variants.VARIANTS, "tiny", wild)
    ensure(tiny, tmp_path)
    assert load(tiny, tmp_path)["found"]["ode"] is None
    (line,) = [line for line in render(tmp_path).splitlines() if line.startswith("| tiny")]
    assert line.split(" | ")[3] == "diverged"


# -------------------------------------------------------------------------------------------------- the page


def committed_keys():
    rows = [*REFERENCES, *VARIANTS]
    keys = [Key(problem, row, seed) for problem in PROBLEMS for row in rows for seed in SEEDS]
    return [key for key in keys if key.row != "two_sets" or PROBLEMS[key.problem].dim > 1]


def test_the_committed_results_are_all_there_and_of_these_settings():
    stale = [key for key in committed_keys() if (load(key) or {}).get("settings") != settings_of(key)]
    assert stale == []


def test_the_committed_results_are_measured_by_the_samplers_of_their_rows():
    for key in committed_keys():
        if key.row in VARIANTS:
            assert set(load(key)["found"]) == set(VARIANTS[key.row].samplers), key


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    text = PAGE.read_text("utf-8")
    assert replace_block(text, render()) == text


def test_every_decimal_number_of_the_text_stands_in_a_table():
    """So that a sentence can't keep a number that the tables no longer have."""
    section = PAGE.read_text("utf-8").split("## Distance to the tilt where it is known")[1]
    before, rest = section.split(BEGIN)
    tables, after = rest.split(END)
    numbers = re.findall(r"\d+\.\d+", before + after.split("\n## ")[0])
    assert len(numbers) > 20
    assert set(numbers) - set(re.findall(r"\d+\.\d+", tables)) == set()


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="oracles:begin"):
        replace_block("a page", "tables")


def test_the_command_renders_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    page = tmp_path / "methods.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    data = tmp_path / "data"
    asked = ["--data", str(data), "--docs", str(tmp_path)]
    bench_oracles.main([*asked, "--problems", "two_modes_quadratic", "--rows", "base", "--seeds", "0"])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("untuned base*") == 1


def test_the_figure_is_drawn_from_the_committed_results(tmp_path):
    write_figure(tmp_path / "oracles.png")
    assert (tmp_path / "oracles.png").read_bytes()[:4] == b"\x89PNG"
