"""The world's images and captions: grammar, the split, defects that change images, the judge's file."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SPRITES = ROOT / "am_diffusers" / "assets" / "world" / "sprites.parquet"


@pytest.fixture(scope="module")
def scripts():
    """The modules of `scripts/assets/pretrain`, apart from the older package of the same name."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "pretrain"}
    sys.path.insert(0, str(ROOT / "scripts" / "assets"))
    import pretrain.judge as judge
    import pretrain.preferences as preferences
    import pretrain.world as world

    yield {"judge": judge, "preferences": preferences, "world": world}
    sys.path.remove(str(ROOT / "scripts" / "assets"))
    for name in [name for name in sys.modules if name.split(".")[0] == "pretrain"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture(scope="module")
def world(scripts):
    return scripts["world"].World(SPRITES)


def test_articles_follow_the_next_word(world):
    captions = world.captions(world.labels(world.combinations))
    words = [pair for caption in captions for pair in zip(caption.split(), caption.split()[1:], strict=False)]
    articles = [pair for pair in words if pair[0] in ("a", "an")]
    assert len(articles) == 2 * len(captions)
    assert all((following[0] in "aeiou") == (article == "an") for article, following in articles)
    assert "an apple on an orange background" in captions


def test_no_object_is_on_a_background_that_hides_it(scripts, world):
    labels = world.labels(world.combinations)
    for concept, background in zip(labels.concept.tolist(), labels.background.tolist(), strict=True):
        chosen = scripts["world"].CONCEPTS[concept]
        assert scripts["world"].COLOUR_NAMES[background] not in chosen.avoids


def test_captions_to_train_and_to_evaluate_with_share_none(world):
    assert not set(world.train.tolist()) & set(world.held_out.tolist())
    assert len(world.train) + len(world.held_out) == len(world.combinations)


def test_every_defect_changes_the_image_and_no_other_condition_does(scripts, world):
    number = len(scripts["world"].CONDITIONS)
    labels = world.labels(world.combinations[:1].repeat(number))
    spoilt = labels.replace(condition=torch.arange(number))
    clean, changed = (world.images(each, torch.Generator().manual_seed(0)) for each in (labels, spoilt))
    assert changed.min() >= 0
    assert changed.max() <= 1
    distance = (clean - changed).abs().mean((1, 2, 3))
    assert distance[0] == 0
    assert (distance[1:] > 0.02).all()


def test_the_share_of_spoilt_images_is_as_said(scripts):
    """Of 20,000 draws the share lies within 4 standard errors."""
    drawn = scripts["world"].draw_conditions(20_000, torch.Generator().manual_seed(0))
    share = (drawn != scripts["world"].CLEAN).float().mean().item()
    assert abs(share - 0.45) < 4 * (0.45 * 0.55 / 20_000) ** 0.5


def test_the_better_image_of_a_pair_is_clean_and_the_worse_one_differs_as_named(scripts, world, tmp_path):
    pairs = scripts["preferences"].Pairs(world, world.train, tmp_path)
    assert pairs.kinds == scripts["preferences"].KINDS[:-1]
    kinds = torch.arange(len(pairs.kinds))
    better, worse, labels = pairs.draw(kinds, torch.Generator().manual_seed(0))
    assert (labels.condition == 0).all()
    assert ((better - worse).abs().mean((1, 2, 3)) > 0.02).all()


def test_a_judge_learns_separable_labels_and_survives_its_file(scripts, tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = scripts["judge"].HEADS.values()
    columns = [torch.randint(size, (400,), generator=generator) for size in sizes]
    features = torch.cat(
        [torch.nn.functional.one_hot(c, s).float() for c, s in zip(columns, sizes, strict=True)], 1
    )
    labels = scripts["world"].Labels(*columns)
    scripts["judge"].fit_judge(features, labels).save(tmp_path / "judge.safetensors")
    found = scripts["judge"].Judge.load(tmp_path / "judge.safetensors").labels(features)
    assert all((getattr(found, head) == getattr(labels, head)).all() for head in scripts["judge"].HEADS)
