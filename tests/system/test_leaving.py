"""The end of a process of a sharded run: status and output are what they would have been."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from am_diffusers.system.leaving import leaving_at_once
atexit.register(lambda: print("taken down"))
with leaving_at_once({sharded}):
    print("work")
    {end}
print("after")
"""


def leave(sharded: bool, end: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(sharded=sharded, end=end)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('error: no')", 1, "error: no\n"),
    ],
)
def test_a_sharded_process_leaves_with_its_status_before_the_interpreter_is_taken_down(end, status, message):
    done = leave(True, end)
    assert (done.returncode, done.stdout, done.stderr) == (status, "work\n", message)


def test_an_error_that_nobody_expected_is_shown_as_ever():
    done = leave(True, "1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_without_sharding_nothing_happens():
    done = leave(False, "pass")
    assert (done.returncode, done.stdout) == (0, "work\nafter\ntaken down\n")
