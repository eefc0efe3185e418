"""The end of a process that worked with others."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Leave a joined process at the end of the block, with its status, without taking the interpreter down.

    Threads of gloo outlive the process group and may ask for Python's lock while the interpreter ends, which
    aborts it, now and then, with status -6 (torch 2.14). Exit functions are called as ever. Nothing happens
    in a process that works alone: the launcher tells each how many there are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    status: object = 0
    try:
        yield
    except SystemExit as leave:
        status = leave.code
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if status is not None and not isinstance(status, int):  # as the interpreter does
        sys.stderr.write(f"{status}\n")
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
