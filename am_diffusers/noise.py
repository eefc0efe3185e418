"""Noise as a function of (seed, iteration, sample id), drawn on the CPU.

Neither the number of processes nor the split into batches changes it; a resumed run needs no generator state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator_for(*key: int | str) -> torch.Generator:
    """CPU generator seeded by the SHA-256 of `key`, for instance (seed, iteration, "shared")."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def generators_for(seed: int, iteration: int, sample_ids: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample: noise = f(seed, iteration, sample id)."""
    return [generator_for(seed, iteration, int(i)) for i in sample_ids]


@dataclass(frozen=True)
class LatentSpec:
    """Shape of one latent, for instance (16, 64, 64), and where and in what precision states are kept."""

    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal latents, row i from generator i, (len(generators), *shape)."""
        return draw(generators, self.shape, self.dtype).to(self.device)


def draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers on the CPU, row i from generator i, (len(generators), *shape)."""
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in generators])
