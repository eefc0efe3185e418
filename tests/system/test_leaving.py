"""The end of a joined process: status and output are what they would have been."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from am_diffusers.system.leaving import leaving_at_once

class Kept:
    def __del__(self, print=print):
        print("taken down")

kept = Kept()
atexit.register(lambda: print("exit function"))
with leaving_at_once():
    print("work")
    {end}
print("after")
"""


def leave(processes: int, end: str) -> subprocess.CompletedProcess[str]:
    code, environment = SCRIPT.format(end=end), os.environ | {"WORLD_SIZE": str(processes)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('error: no')", 1, "error: no\n"),
    ],
)
def test_a_joined_process_leaves_with_its_status_before_the_interpreter_is_taken_down(end, status, message):
    done = leave(2, end)
    assert (done.returncode, done.stdout, done.stderr) == (status, "work\nexit function\n", message)


def test_an_error_that_nobody_expected_is_shown_as_ever():
    done = leave(2, "1 / 0")
    assert (done.returncode, done.stdout) == (1, "work\nexit function\n")
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_process_that_works_alone_ends_as_ever():
    done = leave(1, "pass")
    assert (done.returncode, done.stdout) == (0, "work\nafter\nexit function\ntaken down\n")
