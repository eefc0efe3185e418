import random
from pathlib import Path

import pytest

import am_diffusers
from am_diffusers.prompts.leaks import Leak, find_leaks
from am_diffusers.prompts.sets import load_texts

PROMPTS = Path(am_diffusers.__file__).parent / "assets/prompts"


def kinds(prompt: str, training: str) -> list[str]:
    kinds = [leak.kind for leak in find_leaks([prompt], [training]).leaks]
    assert kinds == [leak.kind for leak in find_leaks([training], [prompt]).leaks], "not symmetric"
    return kinds


@pytest.mark.parametrize(
    ("prompt", "training"),
    [
        ("a red fox", "a red fox"),
        ("a red fox", " A  Red\tFOX\n"),
        ("cafe\u0301 \ufb01re", "CAF\u00c9 fire"),  # decomposed and ligature
        ("...", "..."),
    ],
)
def test_exact(prompt, training):
    assert kinds(prompt, training) == ["exact"]


@pytest.mark.parametrize(
    ("prompt", "training"),
    [
        ("a red fox on a blue background", "red fox, on the blue background"),
        ("a red fox on a blue background", "On a blue background: a red fox!"),
        ("a red fox on a blue background", "The background is blue, the fox is red."),
        ("fox, 3d style, on a blue background", "a 3D-style fox on the blue background"),
        ("a fluffy white cat sleeping on a sofa", "white fluffy cat, sleeping on a sofa"),
        ("a photo of two foxes", "2 foxes"),
        ("a bus with a box", "buses with boxes"),
        ("a berry", "berries"),
        ("a man and a child", "men and children"),
        ("the cat\u2019s toy", "the toys of a cat"),
        ("a sign that says 'Deep Learning'", "A sign that says Deep Learning."),
        ("a dog gives an apple to a squirrel", "To a squirrel, a dog gives an apple."),
    ],
)
def test_reworded(prompt, training):
    assert kinds(prompt, training) == ["reworded"]


@pytest.mark.parametrize(
    ("prompt", "training"),
    [
        ("fox, 3d style, on a blue background", "fox, 3d style, on a red background"),
        ("fox, 3d style, on a blue background", "fox, flat style, on a blue background"),
        ("fox, 3d style, on a blue background", "box, 3d style, on a blue background"),
        ("two dogs", "three dogs"),
        ("a red fox", "a very old red fox"),
        ("a cat on a table", "a cat under a table"),
        ("a street with cars", "a street without cars"),
        ("a red cube and a blue ball", "a blue cube and a red ball"),
        ("red apple, flat style, on a green background", "green apple, flat style, on a red background"),
        ("one cat and two dogs on the grass", "two cats and one dog on the grass"),
        ("red cube, blue ball", "blue cube, red ball"),
        ("a dog riding a horse", "a horse riding a dog"),
        ("a photo of a bench left of a bear", "a photo of a bear left of a bench"),
        ("a red car and a red bus", "a red car and a bus"),
        ("a bus", "a bu"),
        ("a glass", "glas"),
        ("the news", "new"),
        ("\U0001f98a", "\U0001f989"),
        ("the", "a"),
        ("a fox", "a drawing of a fox"),
    ],
)
def test_another_prompt(prompt, training):
    assert kinds(prompt, training) == []


def test_no_false_alarm_on_lists_made_from_templates():
    """Every colour and object of the held-out prompts occurs in the training list."""
    evaluation, train = (load_texts(str(PROMPTS / f"{name}.txt")) for name in ("eval", "train"))
    assert find_leaks(evaluation, train).leaks == ()
    assert {leak.kind for leak in find_leaks(train, train).leaks} == {"exact"}


def test_planted_duplicates_are_found():
    """All of 8 exact and 8 reworded ones, planted among 224 training prompts, and nothing else."""
    evaluation, train = (load_texts(str(PROMPTS / f"{name}.txt")) for name in ("eval", "train"))
    planted = random.Random(0).sample(range(len(evaluation)), 16)
    exact = [evaluation[index].upper() for index in planted[:8]]
    reworded = []
    for index in planted[8:]:
        thing, background = evaluation[index].split(" on ")
        reworded.append(f"On the {background.split(' ', 1)[1]}: {thing}.")
    found = find_leaks(evaluation, [*train, *exact, *reworded, *exact])
    assert found.indices("exact") == sorted(planted[:8])
    assert found.indices("reworded") == sorted(planted[8:])
    assert found.indices() == sorted(planted)
    assert len(found.leaks) == 16
    assert {leak.training_prompt for leak in found.leaks} == {*exact, *reworded}


def test_lines_count_prompts_and_show_the_first():
    found = find_leaks(["a fox", "an owl"], ["A fox", "a fox", "the fox", "a cat"])
    assert found.leaks[0] == Leak(0, "a fox", "A fox", "exact")
    assert found.lines() == [
        "leak check: 2 evaluation prompts, 4 training prompts: 1 evaluation prompts were trained on (1 "
        "exact, 0 reworded): scores on them say little about new prompts",
        "  exact: prompt 0 'a fox': trained on 'A fox'",
        "  exact: prompt 0 'a fox': trained on 'a fox'",
        "  reworded: prompt 0 'a fox': trained on 'the fox'",
    ]
    many = find_leaks([f"fox {i}" for i in range(7)], [f"fox {i}" for i in range(7)]).lines()
    assert len(many) == 7
    assert many[-1] == "  and 2 more"
    mixed = find_leaks(["an owl", "a fox"], ["the owl", "a fox"])
    assert [leak.index for leak in mixed.leaks] == [1, 0], "exact ones first"
    assert find_leaks(["a fox"], ["an owl"]).lines() == [
        "leak check: 1 evaluation prompts, 1 training prompts: none in both, exact or reworded"
    ]
