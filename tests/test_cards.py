"""Tests take no card by accident: numbers of a CPU would be compared with a card's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cards import WITHOUT_CARDS, wants_cards

SEEN = """
import json, os
import pytest

def seen(name):
    with open({file!r}, "a") as file:
        file.write(name + json.dumps([os.environ.get(key) for key in {keys}]) + "\\n")

def test_plain():
    seen("plain")

@pytest.mark.gpu
def test_card():
    seen("card")
"""


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("slow or gpu", True),
        ("", False),
        ("not slow", False),
        ("not slow and not gpu", False),
        ("gpus", False),
    ],
)
def test_a_card_is_asked_for_by_the_mark_gpu_alone(marks, wanted):
    assert wants_cards(marks) == wanted


@pytest.mark.parametrize(
    ("marks", "ran"),
    [
        ([], ['plain["", "true"]']),
        (["-m", "not slow"], ['plain["", "true"]']),
        (["-m", "gpu"], ['card["0", null]']),
    ],
)
def test_cards_are_hidden_from_tests_and_from_processes_that_they_start(tmp_path, marks, ran):
    """In a pytest of its own, on a machine that shows a card."""
    file = tmp_path / "seen"
    (tmp_path / "test_seen.py").write_text(SEEN.format(file=str(file), keys=list(WITHOUT_CARDS)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cards", *marks]
    here, shown = Path(__file__).parent, {k: v for k, v in os.environ.items() if k not in WITHOUT_CARDS}
    done = subprocess.run(
        [*command, "-c", str(here.parent / "pyproject.toml"), str(tmp_path / "test_seen.py")],
        env=shown | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert file.read_text().splitlines() == ran


def test_cards_are_hidden_here():
    assert {key: os.environ.get(key) for key in WITHOUT_CARDS} == WITHOUT_CARDS
