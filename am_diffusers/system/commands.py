"""The command line of the small commands: a mistake is one line, as every other error of theirs."""

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviated flags that says what is wrong in one line, without argparse's usage."""

    def __init__(self, description: str | None) -> None:
        """Take the description that `--help` shows, with its line ends."""
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"error: {message} (all flags: --help)\n")
