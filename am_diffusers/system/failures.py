"""Failures that a user can mend: memory (the phase, its setting, the value to try) and numbers not finite."""

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["rollout", "adjoint", "reward", "loss"]

PHASES: dict[Phase, tuple[str, str]] = {
    "rollout": ("the rollout", "rollout_micro_batch_size"),
    "adjoint": ("the adjoint sweep", "rollout_micro_batch_size"),
    "reward": ("decoding and rewards", "reward_micro_batch_size"),
    "loss": ("the loss", "loss_micro_batch_size"),
}
"""What a phase is called, and the setting that sizes it."""

REMAINING = (
    "--gradient_checkpointing true, --mixed_precision bf16 and a smaller --resolution take less memory"
)


FULL = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Words of libraries that took no memory from torch's allocator: their errors have no type of their own."""


class PhaseMemoryError(ValueError):
    """Out of memory in a phase of an iteration; the message says which, and what to set."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if an exception says that memory ran out, whoever asked for it: torch, cuDNN, cuBLAS or CUDA."""
    if isinstance(error, torch.OutOfMemoryError | PhaseMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def let_go(error: BaseException) -> None:
    """Free the memory of what an exception's frames hold: the tensors of the passes that it came through."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was never started


@contextmanager
def phase(name: Phase, size: int) -> Iterator[None]:
    """Name the part of an iteration that works on `size` samples (of the loss: rows) at once.

    Phases nest: the innermost one is named.

    Raises:
        PhaseMemoryError: for any error that `is_out_of_memory`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what, setting = PHASES[name]
        raise PhaseMemoryError(
            f"out of memory in {what} with {size} at once: {_remedy(name, setting, size)}\n({error})"
        ) from error


def _remedy(name: Phase, setting: str, size: int) -> str:
    if size > 1:
        return f"set --{setting} {size // 2}, or auto to have it found"
    if name == "reward":
        return f"lower --rollout_micro_batch_size, whose last pass is kept meanwhile; {REMAINING}"
    return REMAINING


class NonFiniteError(ValueError):
    """A reward, gradient or adjoint is NaN or infinite."""


def require_finite(name: str, values: Tensor, prompts: Sequence[str]) -> None:
    """Raise NonFiniteError naming the prompts of the rows of `values` (B, ...) that are not finite."""
    finite = values.detach().flatten(1).isfinite().all(1) if values.ndim > 1 else values.isfinite()
    if not finite.all():
        bad = [prompt for prompt, ok in zip(prompts, finite.tolist(), strict=True) if not ok]
        raise NonFiniteError(f"{name} is NaN or infinite for {len(bad)} of {len(finite)} samples: {bad[:4]}")
