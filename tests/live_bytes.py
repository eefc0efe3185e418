"""Bytes of large tensors that are alive, measured operation by operation."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While entered, follows storages of at least `smallest` bytes that operations make.

    Attributes:
        live: bytes now, in memory and in files that are mapped.
        peak: the most of each so far.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.live, self.peak = ({"memory": 0, "files": 0} for _ in range(2))
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() >= self.smallest:
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        where = "memory" if storage.filename is None else "files"

        def free(_) -> None:
            del self._seen[key]
            self.live[where] -= size

        self._seen[key] = weakref.ref(storage, free)
        self.live[where] += size
        self.peak[where] = max(self.peak[where], self.live[where])
