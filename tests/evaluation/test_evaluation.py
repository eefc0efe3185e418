import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from scipy import stats

from am_diffusers.evaluation.grids import comparison_grid, shorten, to_pil
from am_diffusers.evaluation.held_out import summarise
from am_diffusers.evaluation.images import ImageId, image_ids
from am_diffusers.evaluation.pairs import PairScore, official
from am_diffusers.evaluation.statistics import compare, diversity, estimate, pairwise_distance
from am_diffusers.rewards import OFFICIAL, Brightness, PickScore
from analytic_pictures import PROMPTS, field, make_sampler, make_scorer
from reward_models import save_pickscore

RNG = np.random.default_rng


def test_a_constant_shift_is_recovered_exactly_with_an_interval_of_no_width():
    base = RNG(0).normal(5, 2, (40, 4))
    result = compare(base, base + 1.5)
    assert result.gain is not None
    expected = 1.5 / base.std(ddof=1)
    assert [result.gain.value, result.gain.low, result.gain.high] == pytest.approx([expected] * 3, rel=1e-9)
    assert result.tuned_mean - result.base_mean == pytest.approx(1.5)


def test_interval_is_that_of_the_mean_over_prompts():
    """Against the t interval of the same prompt means: n = 300, so the two agree to a few per cent."""
    means = RNG(1).normal(0.3, 1, 300)
    interval = estimate(np.mean, means)
    low, high = stats.t.interval(0.95, 299, means.mean(), stats.sem(means))
    assert interval.value == pytest.approx(means.mean(), abs=1e-12)
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=0.01)


def test_pictures_of_one_prompt_do_not_count_as_independent():
    """Prompt-level differences: four copies of a picture may not narrow the interval."""
    base = np.repeat(RNG(2).normal(size=(50, 1)), 4, axis=1)
    tuned = base + np.repeat(RNG(3).normal(size=(50, 1)), 4, axis=1)
    many, one = compare(base, tuned), compare(base[:, :1], tuned[:, :1])
    width = [r.difference.high - r.difference.low for r in (many, one)]
    assert width[0] == pytest.approx(width[1], rel=1e-9)


def test_pairwise_distance_of_known_vectors():
    same = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    mixed = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    assert pairwise_distance(np.array([same, mixed])) == pytest.approx([0.0, (1 + 1 + 2) / 3])


def test_diversity_kept_of_unchanged_and_of_collapsed_pictures():
    base = RNG(4).normal(size=(20, 4, 8))
    unchanged, collapsed = diversity("f", base, base), diversity("f", base, base[:, :1].repeat(4, axis=1))
    assert (unchanged.kept.low, unchanged.kept.value, unchanged.kept.high) == (1, 1, 1)
    assert collapsed.kept.value == pytest.approx(0, abs=1e-12)


def test_no_spread_in_the_base_is_said_where_the_gain_would_be():
    pairs = [PairScore(p, i, {"a": (1.0, 0.0)}, None) for p in range(3) for i in range(2)]
    evaluation = summarise(pairs, {"a": "held-out"}, None)
    json.dumps(evaluation.to_dict(), allow_nan=False)
    (line,) = evaluation.headline()
    assert "all base images have the same score (1 -> 0)" in line


def make_pairs():
    rng = RNG(5)
    return [
        PairScore(p, s, {"a": (base := rng.normal(), base + 1), "b": (base, -base)}, rng.normal(size=(2, 6)))
        for p in range(5)
        for s in range(3)
    ]


def test_summary_does_not_depend_on_the_order_of_the_pairs():
    pairs, roles = make_pairs(), {"a": "trained", "b": "held-out"}
    summary = summarise(pairs, roles, "b")
    assert summary == summarise(pairs[::-1], roles, "b")
    assert (summary.num_prompts, summary.images_per_prompt, list(summary.rewards)) == (5, 3, ["a", "b"])
    stacked = np.stack([pair.features for pair in pairs]).reshape(5, 3, 2, 6)
    assert summary.diversity == diversity("b", stacked[:, :, 0], stacked[:, :, 1])
    json.dumps(summary.to_dict(), allow_nan=False)


def test_headline_names_reward_interval_and_diversity():
    lines = summarise(make_pairs(), {"a": "trained", "b": "held-out"}, "b").headline()
    assert [line.split(":")[0] for line in lines] == [
        "trained reward a",
        "held-out reward b",
        "diversity kept (b image features)",
    ]
    assert all("[" in line for line in lines)
    assert len(summarise(make_pairs(), {"a": "trained"}, None).headline()) == 1


# Two prompts: see COVERAGE of test_comparison. The plain percentile interval has 50 and 12 %.
@pytest.mark.parametrize(("num_prompts", "expected"), [(2, 0.0692), (10, 0.05)])
def test_the_headline_seldom_finds_a_model_different_from_itself(num_prompts, expected):
    """Of 400 evaluations of the base against itself, within four standard errors."""
    rng, found = RNG(6), []
    for _ in range(400):
        scores, features = rng.normal(size=(num_prompts, 2, 2)), rng.normal(size=(num_prompts, 2, 2, 8))
        pairs = [
            PairScore(p, i, {"a": (scores[p, i, 0], scores[p, i, 1])}, features[p, i])
            for p in range(num_prompts)
            for i in range(2)
        ]
        evaluation = summarise(pairs, {"a": "held-out"}, "a")
        gain, kept = evaluation.rewards["a"].gain, evaluation.diversity.kept
        assert f"{gain.value:+.2f} base sd [{gain.low:+.2f}, {gain.high:+.2f}]" in evaluation.headline()[0]
        assert f"{kept.value:.0%} [{kept.low:.0%}, {kept.high:.0%}]" in evaluation.headline()[1]
        found.append((gain.low > 0 or gain.high < 0, kept.low > 1 or kept.high < 1))
    error = 4 * math.sqrt(expected * (1 - expected) / 400)
    by_gain, by_diversity = np.mean(found, axis=0)
    assert by_gain == pytest.approx(expected, abs=error)
    assert by_diversity <= expected + error  # a ratio: somewhat wider


# From here on: images, pairs and grids of analytic fields.


def to_pils(images):
    return [to_pil(image) for image in images]


def test_pictures_do_not_depend_on_the_batch_they_are_made_in():
    which = image_ids(3, 3)
    reference = make_sampler(9).images(field(0.0), PROMPTS, which)
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(make_sampler(batch_size).images(field(0.0), PROMPTS, which), reference)
    some = [ImageId(2, 1), ImageId(0, 2)]
    torch.testing.assert_close(make_sampler().images(field(0.0), PROMPTS, some), reference[[7, 2]])


def test_every_picture_has_noise_of_its_own_that_is_a_function_of_the_seed():
    def seeds(seed):
        return [make_sampler(seed=seed).generator(picture).initial_seed() for picture in image_ids(3, 3)]

    assert len({*seeds(3), *seeds(4)}) == 18
    assert seeds(3) == seeds(3)


def test_pairs_are_scored_for_their_prompt_whatever_the_batch(tmp_path):
    save_pickscore(tmp_path)
    pick = PickScore.from_pretrained(tmp_path)
    which = image_ids(3, 2)
    reference = make_scorer(6, [pick, Brightness()], pick).pairs(PROMPTS, which)
    again = make_scorer(4, [pick, Brightness()], pick).pairs(PROMPTS, which)
    assert [(pair.prompt, pair.image) for pair in reference] == which
    sampler = make_sampler()
    for pair, other in zip(reference, again, strict=True):
        assert other.scores["pickscore"] == pytest.approx(pair.scores["pickscore"], rel=1e-4)
        one = [ImageId(pair.prompt, pair.image)]
        for place, shift in enumerate((0.0, 0.1)):
            picture = sampler.images(field(shift), PROMPTS, one)
            expected = pick(picture, [PROMPTS[pair.prompt]]).item()
            assert pair.scores["pickscore"][place] == pytest.approx(expected, rel=1e-4)
            assert pair.scores["brightness"][place] == pytest.approx(picture.mean().item(), rel=1e-5)
            assert pair.features is not None
            np.testing.assert_allclose(pair.features[place], pick.image_features(picture)[0], atol=1e-5)


def test_evaluation_of_a_known_shift_end_to_end():
    """Pictures brighter by 0.1 everywhere: the gain is 0.1 in standard deviations of the base."""
    pairs = make_scorer(5, [Brightness()]).pairs(PROMPTS, image_ids(3, 4))
    gain = summarise(pairs, {"brightness": "trained"}, None).rewards["brightness"]
    assert gain.difference.value == pytest.approx(0.1, abs=1e-5)
    assert gain.difference.low == pytest.approx(0.1, abs=1e-5)


def test_official_mode_shares_weights_and_leaves_the_reward_as_it_is(tmp_path):
    save_pickscore(tmp_path)
    pick = PickScore.from_pretrained(tmp_path)
    published = official(pick)
    assert pick.differentiable
    assert not published.differentiable
    images = torch.rand(2, 3, 40, 40)
    expected = PickScore.from_pretrained(tmp_path, options=OFFICIAL)(images, ["a", "b"])
    torch.testing.assert_close(published(images, ["a", "b"]), expected)
    brightness = Brightness()
    assert official(brightness) is brightness


def cell(grid, row, column):
    """A 40-pixel picture of a grid, drawn at three times the size, as integers."""
    top, left = 16 + 6 + row * (16 + 120 + 6) + 16, 6 + column * (120 + 6)
    return np.asarray(grid)[top : top + 120 : 3, left : left + 120 : 3].astype(int)


def test_grid_has_base_beside_tuned_of_the_same_noise():
    base, tuned = torch.rand(6, 3, 40, 40), torch.rand(6, 3, 40, 40)
    grid = comparison_grid(PROMPTS, to_pils(base), to_pils(tuned))
    assert grid.size == (4 * 126 + 6, 16 + 6 + 3 * 142)
    for row in range(3):
        for image in range(2):
            for place, pictures in enumerate((base, tuned)):
                expected = np.asarray(to_pil(pictures[2 * row + image])).astype(int)
                assert np.array_equal(cell(grid, row, 2 * image + place), expected)


def test_grid_names_its_columns_and_rows():
    """Text is where it should be: dark pixels on white above columns and rows, none in the margins."""
    white = to_pils(torch.ones(2, 3, 40, 40))
    grid = np.asarray(comparison_grid(["a prompt"], white, white).convert("L"))
    assert (grid[:16, 6:60] < 100).any()
    assert (grid[:16, 132:190] < 100).any()
    assert (grid[22:38, 6:126] < 100).any()
    assert (grid[38:] > 250).all()
    other = np.asarray(comparison_grid(["another"], white, white).convert("L"))
    assert not np.array_equal(grid[22:38], other[22:38])


def test_long_prompts_are_cut_to_the_width():
    font = ImageFont.load_default(size=12)
    assert shorten("short", font, 500) == "short"
    cut = shorten("word " * 100, font, 200)
    assert cut.endswith("...")
    assert font.getlength(cut) <= 200


def test_captions_stand_under_their_pictures_and_the_legend_at_the_end():
    white = to_pils(torch.ones(2, 3, 40, 40))
    captions = (["", "19.1"], ["", ""])
    grid = comparison_grid(["a prompt"], white, white, captions=captions, legend="score")
    plain = comparison_grid(["a prompt"], white, white)
    assert grid.size == (plain.width, plain.height + 2 * 16)
    pixels = np.asarray(grid.convert("L"))
    under = [(pixels[158:174, 6 + 126 * i : 126 * (i + 1)] < 100).any() for i in range(4)]
    assert under == [False, False, True, False]
    assert (pixels[-16:, 6:60] < 100).any()


def test_text_grows_with_the_pictures():
    small, large = (comparison_grid(["p"], [i], [i]) for i in (Image.new("RGB", (s, s)) for s in (128, 1024)))
    heights = [np.flatnonzero(~(np.asarray(g.convert("L")) > 250).all(1))[0] for g in (small, large)]
    assert small.height - 128 == 16 + 6 + 16 + 6
    assert large.height - 1024 == 42 + 6 + 42 + 6
    assert heights[1] > heights[0]
