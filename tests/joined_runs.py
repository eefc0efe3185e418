"""Runs of the finetune script one after the other by the same joined processes.

    accelerate launch ... joined_runs.py a.yaml b.yaml

Starting the processes takes longer than a tiny run. A run takes leave of the others at its end; here that
waits for the last one's.
"""

import runpy
import sys

from accelerate.state import PartialState

from am_diffusers.system.leaving import leaving_at_once
from finetune_runs import FINETUNE


def main() -> None:
    configs = sys.argv[1:]
    leave = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self, group=None: None  # pyright: ignore[reportAttributeAccessIssue]
    for config in configs:
        sys.argv = [str(FINETUNE), "--config", config]
        runpy.run_path(str(FINETUNE))["main"]()
    leave(PartialState())


if __name__ == "__main__":
    with leaving_at_once():
        main()
