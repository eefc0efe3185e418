"""Bytes and FLOPs of code that runs on tensors without data.

Such tensors (torch's fake tensors: the meta device under another name) go through the real kernels' choices
and shapes, autograd keeps and frees what it would keep and free, and nothing is computed or allocated. The
tracker watches every operation: a storage counts from the operation that made it until it is freed.
What a kernel allocates inside itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Flops = Counter[torch.dtype]


@dataclass
class Usage:
    """Needs of some code.

    Attributes:
        peak: most bytes held at a time.
        before: bytes held when it started; for a phase, at the start of the part with the highest peak.
        flops: floating point operations of matrix products, convolutions and attention, by dtype.
    """

    peak: int = 0
    before: int = 0
    flops: Flops = field(default_factory=Counter)


class Tracker(TorchDispatchMode):
    """Counter of live bytes of data-free tensors while it is entered, by phase, and of FLOPs.

    A value read from such a tensor is made up, so that checks pass: flags are true, counts 0, numbers 0.5.

    Attributes:
        live: bytes held now.
        phases: needs of the code inside `phase(name)`, by name; inner phases count for themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.phases: dict[str, Usage] = {}
        self._current: Usage | None = None
        self._references: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made before; return the bytes that this adds."""
        before = self.live
        for tensor in tensors:
            self._add(tensor)
        return self.live - before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count everything inside as the phase `name`."""
        with self._watch() as usage:
            yield
        known = self.phases.setdefault(name, Usage())
        known.flops.update(usage.flops)
        if usage.peak > known.peak:
            known.peak, known.before = usage.peak, usage.before

    def cost(self, function: Callable[[], object]) -> Usage:
        """Run `function` for its needs alone, in bytes beyond those held before; no phase counts them."""
        with self._watch() as usage:
            function()
        return Usage(usage.peak - usage.before, 0, usage.flops)

    def replay(self, cost: Usage, times: float = 1) -> None:
        """Count a cost again, now, as if its code had been run `times` times in a row."""
        self._reach(self.live + cost.peak)
        if self._current is not None:
            for dtype, number in cost.flops.items():
                self._current.flops[dtype] += round(times * number)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count `size` more bytes as held inside."""
        self.live += size
        self._reach(self.live)
        try:
            yield
        finally:
            self.live -= size

    @contextmanager
    def _watch(self) -> Iterator[Usage]:
        outer, usage = self._current, Usage(self.live, self.live)
        self._current = usage
        try:
            yield usage
        finally:
            self._current = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            return args[0].fake_device  # asked for thousands of times
        if func is aten._local_scalar_dense.default and _is_empty(args[0]):
            return _made_up(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        outputs = [value for value in tree_iter(result) if isinstance(value, Tensor) and _is_empty(value)]
        for output in outputs:
            if output.untyped_storage()._cdata not in self._references:
                self._add_new(output, args)
        if outputs and self._current is not None:
            self._current.flops[outputs[0].dtype] += _flops(func, args, kwargs or {}, result)
        return result

    def _add_new(self, output: Tensor, inputs: object) -> None:
        """Count an output, unless it is a view of a tensor from before."""
        storage = output.untyped_storage()._cdata
        tensors = (value for value in tree_iter(inputs) if isinstance(value, Tensor) and _is_empty(value))
        if all(storage != tensor.untyped_storage()._cdata for tensor in tensors):
            self._add(output)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._references:
            return

        def free(_: object) -> None:
            del self._references[key]
            self.live -= size

        self._references[key] = weakref.ref(storage, free)
        self.live += size
        self._reach(self.live)

    def _reach(self, size: int) -> None:
        if self._current is not None:
            self._current.peak = max(self._current.peak, size)


# What the CPU's attention kernel costs is not registered; the arguments begin as those of the CUDA kernel.
_CUDA = "_scaled_dot_product_flash_attention"
_SAME_FLOPS = {
    getattr(aten, f"{_CUDA}_for_cpu{direction}"): getattr(aten, f"{_CUDA}{direction}")
    for direction in ("", "_backward")
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> int:
    packet = func._overloadpacket
    formula = flop_registry.get(_SAME_FLOPS.get(packet, packet))
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def _made_up(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 0


def _is_empty(tensor: Tensor) -> bool:
    return tensor.untyped_storage().device.type == "meta"
