"""The world's images and captions: grammar, the split, defects that change images, the judge's file."""

from pathlib import Path

import pytest
import torch
from pretrain.export import measured
from pretrain.judge import NAMES, fit_judge
from pretrain.preferences import KINDS, Pairs
from pretrain.world import CLEAN, COLOUR_NAMES, CONCEPTS, CONDITIONS, Labels, World, draw_conditions

from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier
from am_diffusers.rewards.world import FRAME, Heads, judge_features

ROOT = Path(__file__).parent.parent
SPRITES = ROOT / "am_diffusers" / "assets" / "world" / "sprites.parquet"


@pytest.fixture(scope="module")
def world():
    return World(SPRITES)


def test_articles_follow_the_next_word(world):
    captions = world.captions(world.labels(world.combinations))
    words = [pair for caption in captions for pair in zip(caption.split(), caption.split()[1:], strict=False)]
    articles = [pair for pair in words if pair[0] in ("a", "an")]
    assert len(articles) == 2 * len(captions)
    assert all((following[0] in "aeiou") == (article == "an") for article, following in articles)
    assert "an apple on an orange background" in captions


def test_no_object_is_on_a_background_that_hides_it(world):
    labels = world.labels(world.combinations)
    for concept, background in zip(labels.concept.tolist(), labels.background.tolist(), strict=True):
        chosen = CONCEPTS[concept]
        assert COLOUR_NAMES[background] not in chosen.avoids


def test_captions_to_train_and_to_evaluate_with_share_none(world):
    assert not set(world.train.tolist()) & set(world.held_out.tolist())
    assert len(world.train) + len(world.held_out) == len(world.combinations)


def test_every_defect_changes_the_image_and_no_other_condition_does(world):
    number = len(CONDITIONS)
    labels = world.labels(world.combinations[:1].repeat(number))
    spoilt = labels.replace(condition=torch.arange(number))
    clean, changed = (world.images(each, torch.Generator().manual_seed(0)) for each in (labels, spoilt))
    assert changed.min() >= 0
    assert changed.max() <= 1
    distance = (clean - changed).abs().mean((1, 2, 3))
    assert distance[0] == 0
    assert (distance[1:] > 0.02).all()


def test_the_share_of_spoilt_images_is_as_said():
    """Of 20,000 draws the share lies within 4 standard errors."""
    drawn = draw_conditions(20_000, torch.Generator().manual_seed(0))
    share = (drawn != CLEAN).float().mean().item()
    assert abs(share - 0.45) < 4 * (0.45 * 0.55 / 20_000) ** 0.5


def test_the_better_image_of_a_pair_is_clean_and_the_worse_one_differs_as_named(world, tmp_path):
    pairs = Pairs(world, world.train, tmp_path)
    assert pairs.kinds == KINDS[:-1]
    kinds = torch.arange(len(pairs.kinds))
    better, worse, labels = pairs.draw(kinds, torch.Generator().manual_seed(0))
    assert (labels.condition == 0).all()
    assert ((better - worse).abs().mean((1, 2, 3)) > 0.02).all()


def test_a_judge_learns_separable_labels_and_survives_its_file(tmp_path):
    generator, names = torch.Generator().manual_seed(0), NAMES
    columns = {head: torch.randint(len(each), (800,), generator=generator) for head, each in names.items()}
    features = torch.cat(
        [torch.nn.functional.one_hot(columns[head], len(each)).float() for head, each in names.items()], 1
    )
    fit_judge(features, Labels(**columns)).save(tmp_path / "judge.safetensors")
    heads = Heads.load(tmp_path / "judge.safetensors")
    for head, column in columns.items():
        assert heads.answers(features, head) == [names[head][row] for row in column.tolist()]


def test_the_judge_sees_the_colour_of_the_frame():
    """A frame of one colour around any middle: its mean colour and products, whatever the classifier says."""
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    colour = torch.tensor([0.2, -0.5, 0.9])
    edge = torch.ones(224, 224, dtype=torch.bool)
    edge[FRAME:-FRAME, FRAME:-FRAME] = False
    pixels[:, :, edge] = colour[:, None]
    classifier = load_classifier(ImageNetClass.released).eval()
    with torch.no_grad():
        features = judge_features(classifier, pixels)
    assert features.shape == (2, 1280 + 3 + 9)
    torch.testing.assert_close(features[0, 1280:1283], colour)
    torch.testing.assert_close(features[1, 1283:], torch.outer(colour, colour).flatten())


def test_export_collects_what_the_stages_measured_last(tmp_path):
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1, "clean share": 0.1}\n{"step": 2, "clean share": 0.51562}\n'
    )
    (tmp_path / "judge.json").write_text('{"images": 2048, "concept": 0.998046875}')
    (tmp_path / "rewards.json").write_text('{"hpsv2": {"cut off": 0.9649999737}}')
    assert measured(tmp_path) == {
        "base": {"step": 2, "clean share": 0.5156},
        "judge": {"images": 2048, "concept": 0.998},
        "rewards": {"hpsv2": {"cut off": 0.965}},
    }
