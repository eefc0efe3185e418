"""CUDA without a card: tensors without data that say they are on one, and a list of the host's reads.

FakeTensorMode gives such tensors CUDA's choices and refuses an operation on two devices. Three things of a
card are missing then, and are made up here: factories and copies that name a card, the backward pass
(autograd's engine has no thread for a device that isn't there; it is told "meta", which needs none), and
autocast (whose kernels ask for the device in the same way, and so leave these tensors alone).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Of torch's lists those that these networks call.
IN_HALF = {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "conv2d", "scaled_dot_product_attention"}
IN_FLOAT = {"layer_norm", "group_norm", "softmax", "rms_norm", "cosine_similarity", "mse_loss"}


class Waits(TorchDispatchMode):
    """Runs operations of `fake` tensors and records where the host reads a number or a tensor of the card.

    A number that is read is made up: true, or 1.

    Attributes:
        places: files on the stack of each such wait.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.places: list[set[str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            device = args[0].fake_device
            return torch.device("meta") if device.type == "cuda" else device
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self._record(args[0])
            return _made_up(args[0].dtype)
        if func is aten._pin_memory.default:
            return args[0]
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        if device.type == "cpu" and args and isinstance(args[0], Tensor):
            self._record(args[0])
        if device.type in ("meta", "cuda"):
            kwargs["device"] = CUDA
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(self, read: Tensor) -> None:
        if read.device.type == "cuda":
            frame, files = sys._getframe(1), set[str]()
            while frame is not None:
                files.add(frame.f_code.co_filename)
                frame = frame.f_back
            self.places.append(files)


class Calls(TorchFunctionMode):
    """Lets Python's calls name a card that isn't there, and casts as CUDA's autocast does."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        named: dict[str, Any] = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda") and name in IN_HALF | IN_FLOAT:
            dtype = torch.get_autocast_dtype("cuda") if name in IN_HALF else torch.float32
            args, named = tree_map_only(Tensor, _cast(dtype), (args, named))
        if name == "new_tensor" and args[0].device.type == "cuda":  # torch would look for the driver
            data = torch.tensor(*args[1:], **{"dtype": args[0].dtype, **named})
            with self.fake:
                return data.to(CUDA)
        if any(_names_a_card(value) for value in (*args, *named.values())):
            with self.fake:
                return func(*args, **named)
        return func(*args, **named)


@contextmanager
def fake_cuda(fake: FakeTensorMode) -> Iterator[Waits]:
    """Run with a card that has no data; `fake` makes the tensors."""
    with pytest.MonkeyPatch.context() as patch, Waits(fake) as waits, Calls(fake):
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.nn.Module, "to", _move)
        run = vars(torch.autograd)["_engine_run_backward"]

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            # A mode is off in the functions that it is called with: not in what checkpointing recomputes.
            with Calls(fake):
                return run(*args, **kwargs)

        patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
        yield waits


def _move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Do as `Module.to`, which writes into the parameters that are there and can't change their device."""
    parse: Any = vars(torch._C)["_nn"]._parse_to
    device, dtype, *_ = parse(*args, **kwargs)
    for part in module.modules():
        stores: Any = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    cast = dtype if tensor.is_floating_point() else None
                    moved = tensor.detach().to(device=device, dtype=cast)
                    trained = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved, tensor.requires_grad) if trained else moved
    return module


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == "cuda" else tensor

    return cast


def _names_a_card(value: object) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _made_up(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
