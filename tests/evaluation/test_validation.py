"""Scores of fixed pictures as training goes on, by fields in closed form."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from am_diffusers.evaluation.grids import to_pil
from am_diffusers.evaluation.images import image_ids
from am_diffusers.evaluation.pairs import PairScore
from am_diffusers.evaluation.statistics import compare
from am_diffusers.evaluation.validation import Validation, ValidationLog, validation_metrics
from am_diffusers.rewards import Brightness
from am_diffusers.velocity import CallableField
from analytic_pictures import PROMPTS, field, make_sampler, make_scorer


class Tint:
    """Image features (N, 3): the mean colour."""

    name = "tint"

    def image_features(self, images):
        return images.flatten(2).mean(2)


def process(index, number, gather_objects):
    return SimpleNamespace(index=index, number=number, gather_objects=gather_objects)


def make_validation(scorer, **changes):
    validation = Validation(
        scorer,
        prompts=PROMPTS,
        num_in_grid=2,
        images_per_prompt=2,
        roles={"brightness": "trained"},
        processes=process(0, 1, lambda mine: mine),
        log=None,
    )
    return replace(validation, **changes)


def test_a_known_shift_is_measured_in_base_standard_deviations():
    """Pictures brighter by 0.1 everywhere, all alike: an interval of no width, diversity unchanged."""
    metrics = make_validation(make_scorer(4, [Brightness()], Tint()))(7)
    base = make_sampler().images(field(0.0), PROMPTS, image_ids(3, 2)).flatten(1).mean(1).double()
    assert metrics["validation/brightness_base"] == pytest.approx(base.mean().item(), rel=1e-6)
    assert metrics["validation/brightness"] == pytest.approx(base.mean().item() + 0.1, rel=1e-5)
    for end in ("", "_low", "_high"):
        assert metrics[f"validation/brightness_gain{end}"] == pytest.approx(0.1 / base.std().item(), rel=1e-3)
    assert 0 < metrics["validation/diversity_kept"] < 1


def test_an_untrained_model_gains_exactly_nothing():
    metrics = make_validation(make_scorer(4, [Brightness()], Tint(), shift=0.0))(0)
    for end in ("", "_low", "_high"):
        assert metrics[f"validation/brightness_gain{end}"] == 0
        assert metrics[f"validation/diversity_kept{end}"] == pytest.approx(1, abs=1e-12)


def test_base_pictures_are_made_and_scored_once():
    calls = {"base": 0, "scored": 0}

    class Counted(Brightness):
        def __call__(self, images, prompts):
            calls["scored"] += len(images)
            return super().__call__(images, prompts)

    def base(x, sigma, cond):
        calls["base"] += 1
        return field(0.0)(x, sigma, cond)

    shift = [0.0]
    scorer = replace(
        make_scorer(16, [Counted()]),
        base=CallableField(base),
        tuned=CallableField(lambda x, sigma, cond: field(shift[0])(x, sigma, cond)),
    )
    validation = make_validation(scorer)
    validation(0)
    shift[0] = 0.1
    assert validation(5)["validation/brightness_gain"] > 0
    assert calls == {"base": 5, "scored": 3 * 6}


def test_processes_share_the_pictures_and_know_all_scores():
    whole, shares = [], [[], []]
    expected = make_validation(
        make_scorer(4, [Brightness()]), processes=process(0, 1, lambda mine: whole.extend(mine) or mine)
    )(0)
    for index in range(2):
        part = make_validation(
            make_scorer(4, [Brightness()]),
            processes=process(index, 2, lambda mine, i=index: shares[i].extend(mine) or whole[::-1]),
        )
        assert part(0) == expected
    assert [len(share) for share in shares] == [3, 3]
    together = sorted([*shares[0], *shares[1]], key=lambda pair: pair[0].image_id)
    assert [pair[0].image_id for pair in together] == image_ids(3, 2)
    for (base, tuned), (base_alone, tuned_alone) in zip(together, whole, strict=True):
        assert base.scores == pytest.approx(base_alone.scores, rel=1e-6)
        assert tuned.scores == pytest.approx(tuned_alone.scores, rel=1e-6)
        assert base.image == base_alone.image


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_picture_that_is_not_finite_names_iteration_model_and_prompts(name):
    def broken(x, sigma, cond):
        rows = torch.tensor([prompt == "bright" for prompt in cond.prompts]).view(-1, 1, 1, 1)
        return field(0.0)(x, sigma, cond).where(~rows, torch.nan)

    scorer = replace(make_scorer(4, [Brightness()]), **{name: CallableField(broken)})
    with pytest.raises(ValueError, match=rf"iteration 12: validation: {name} images of .*'bright'.* finite"):
        make_validation(scorer)(12)


def test_a_score_that_is_not_finite_names_iteration_model_reward_and_prompt():
    class Broken(Brightness):
        def __call__(self, images, prompts):
            bright = torch.tensor([prompt == "bright" for prompt in prompts])
            return super().__call__(images, prompts).where(~bright, torch.inf)

    message = "iteration 12: validation: brightness is inf for the base image of 'bright'"
    with pytest.raises(ValueError, match=message):
        make_validation(make_scorer(4, [Broken()]))(12)


def make_pairs(prompts, images, *, constant=False, flat=False):
    rng = np.random.default_rng(0)
    pairs = []
    for picture in image_ids(prompts, images):
        base, features = 3.0 if constant else rng.normal(), rng.normal(size=(2, 4))
        pairs.append(PairScore(*picture, {"a": (base, base + 1)}, np.ones((2, 4)) if flat else features))
    return pairs


@pytest.mark.parametrize(
    ("pairs", "gain", "diversity"),
    [
        (make_pairs(3, 2), True, True),
        (make_pairs(3, 1), True, False),
        (make_pairs(1, 4), False, False),
        (make_pairs(3, 2, constant=True), False, True),
        (make_pairs(3, 2, flat=True), True, False),
    ],
)
def test_what_cannot_be_measured_is_left_out(pairs, gain, diversity):
    metrics = validation_metrics(pairs, {"a": "trained"})
    assert metrics["validation/a"] == pytest.approx(metrics["validation/a_base"] + 1)
    assert ("validation/a_gain" in metrics, "validation/diversity_kept" in metrics) == (gain, diversity)
    json.dumps(metrics, allow_nan=False)


def test_gain_is_that_of_the_evaluation():
    pairs = make_pairs(6, 3)
    scores = np.array([pair.scores["a"] for pair in pairs]).reshape(6, 3, 2)
    gain = compare(scores[..., 0], scores[..., 1]).gain
    assert gain is not None
    metrics = validation_metrics(pairs[::-1], {"a": "trained"})
    measured = [metrics[f"validation/a_gain{end}"] for end in ("", "_low", "_high")]
    assert measured == [gain.value, gain.low, gain.high]


@pytest.fixture
def run_folder(tmp_path):
    config = {"output_dir": "out", "rewards": [{"name": "brightness"}], "max_grad_norm": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_validation_is_written_drawn_and_tracked(run_folder):
    tracked, images = [], []
    log = ValidationLog(
        run_folder,
        track=lambda metrics, iteration: tracked.append((iteration, metrics)),
        track_images=lambda named, iteration: images.append(
            (iteration, {n: i.size for n, i in named.items()})
        ),
    )
    scorer = make_scorer(4, [Brightness()])
    metrics = make_validation(scorer, log=log.write)(50)
    assert json.loads((run_folder / "validation.jsonl").read_text()) == {"iteration": 50, **metrics}
    assert tracked == [(50, metrics)]
    grid = Image.open(run_folder / "samples/iteration-000050.png")
    panel = Image.open(run_folder / "samples/panel.png")
    assert images == [(50, {"validation/samples": grid.size, "validation/panel": panel.size})]
    listed = json.loads((run_folder / "samples/pictures.json").read_text())
    assert listed["prompts"] == PROMPTS[:2]
    for picture in listed["pictures"]:
        noise = torch.randn((3, 40, 40), generator=torch.Generator().manual_seed(picture["seed"]))
        cond = make_sampler().encode([PROMPTS[picture["prompt"]]])
        drawn = scorer.sampler.latents.draw([torch.Generator().manual_seed(picture["seed"])])
        assert torch.equal(drawn[0], noise)
        assert cond.prompts == (listed["prompts"][picture["prompt"]],)
    # Row 1, its second base picture, three times as large under a line of header and one of prompt.
    top, left = 16 + 6 + (16 + 120 + 16 + 6) + 16, 6 + 2 * 126
    cell = np.asarray(grid)[top : top + 120 : 3, left : left + 120 : 3]
    (expected,) = make_sampler().images(field(0.0), PROMPTS, [image_ids(3, 2)[3]])
    assert np.array_equal(cell, np.asarray(to_pil(expected)))


def test_a_resumed_run_replaces_the_lines_from_there_on(run_folder):
    log = ValidationLog(run_folder, track=lambda *_: None, track_images=lambda *_: None)
    picture = Image.new("RGB", (8, 8))

    def iterations(*validated):
        for iteration in validated:
            log.write(iteration, {"validation/brightness": iteration + len(validated)}, picture, {})
        lines = [json.loads(line) for line in (run_folder / "validation.jsonl").read_text().splitlines()]
        return [(line["iteration"], line["validation/brightness"]) for line in lines]

    assert iterations(0, 2, 4, 6) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert iterations(4) == [(0, 4), (2, 6), (4, 5)]
    assert iterations(0) == [(0, 1)]
