"""The machine's cards are for the tests that are marked `gpu`, and only if pytest is asked for these."""

import os
import re

import pytest

# Read by CUDA and by accelerate, here and in the processes that tests start.
WITHOUT_CARDS = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def wants_cards(marks: str) -> bool:
    """Tell if pytest's `-m` asks for the tests that need a card."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Hide the machine's cards: numbers of a CPU would be compared with theirs."""
    if not wants_cards(config.option.markexpr):
        os.environ.update(WITHOUT_CARDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a card where cards are hidden."""
    if wants_cards(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: pytest -m gpu"))
