"""The end of a process whose weights were spread over several (FSDP2)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_at_once(sharded: bool) -> Iterator[None]:
    """Leave the process at the end of the block, with its status, without taking the interpreter down.

    FSDP2 keeps the process group after `destroy_process_group`. Threads of gloo outlive it and may ask for
    Python's lock while the interpreter ends, which aborts it, now and then, with status -6 (torch 2.14). What
    has to be written or finished must be so before the block ends.

    Args:
        sharded: whether weights are spread; if not, nothing happens here.
    """
    if not sharded:
        yield
        return
    status: object = 0
    try:
        yield
    except SystemExit as leave:
        status = leave.code
    if status is not None and not isinstance(status, int):  # as the interpreter does
        sys.stderr.write(f"{status}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
