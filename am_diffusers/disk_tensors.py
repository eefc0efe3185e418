"""Tensors on the disk, mapped into memory: read when they are used, gone with the process that made them."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PREFIX = ".tensors-"


@dataclass(frozen=True)
class DiskTensors:
    """Puts tensors into files of a folder.

    A file loses its name as soon as it is mapped: its room is free again when the tensor is, or when the
    process ends, however it does.

    Attributes:
        folder: on a local disk, with room for all tensors that are kept.
    """

    folder: Path

    def __call__(self, tensor: Tensor) -> Tensor:
        """An equal tensor on the disk; the tensor itself if it is one of this folder. Not to be written to.

        Raises:
            ValueError: if there's no room; says what to do.
        """
        folder = self.folder.resolve()
        name = tensor.untyped_storage().filename
        if name is not None and Path(name).parent == folder:
            return tensor
        values = tensor.detach().cpu().contiguous()
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        try:
            # Written, not mapped: a full disk is then an error here, by Python's own file also in the last
            # few bytes (numpy's `tofile` loses that one, and mapping would fill up with zeros).
            with os.fdopen(handle, "wb") as file:
                file.write(values.flatten().view(torch.uint8).numpy().data)
            mapped = torch.from_file(name, shared=True, size=values.numel(), dtype=values.dtype)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: no room for the buffer ({error}): free some space, lower --buffer_size, or "
                "keep it in memory with --buffer_storage cpu"
            ) from error
        finally:
            os.unlink(name)
        return mapped.view(values.shape)

    def clean(self) -> None:
        """Remove what processes left that were killed between making a file and mapping it."""
        for path in self.folder.glob(f"{PREFIX}*"):
            path.unlink(missing_ok=True)
