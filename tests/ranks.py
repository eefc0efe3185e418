"""Several ranks in one process: a thread each, which meet where they exchange."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class Ranks:
    """Runs one function per rank in threads, with a gather that meets the other ranks' tensors."""

    def __init__(self, num: int) -> None:
        self.num, self.barrier, self.parts = num, threading.Barrier(num), {}

    def run(self, function: Callable[..., Any]) -> list[Any]:
        results = {}

        def work(rank):
            def gather(values):
                self.parts[rank] = values
                self.barrier.wait()
                joined = torch.cat([self.parts[r] for r in range(self.num)])
                self.barrier.wait()
                return joined

            try:
                results[rank] = function(rank, gather)
            except Exception:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(self.num)]
