"""The lines of the estimate that a user reads."""

from types import SimpleNamespace
from typing import Any

import pytest

from am_diffusers.estimate.printing import _of_all
from am_diffusers.estimate.report import GIB


@pytest.mark.parametrize(
    ("processes", "said"), [(1, ""), (8, " in each process, 16.00 GiB if all 8 are on one machine")]
)
def test_encoded_prompts_are_told_for_all_processes_of_a_machine(processes: int, said: str) -> None:
    found: Any = SimpleNamespace(main_memory=2 * GIB)
    assert _of_all(found, processes) == said
