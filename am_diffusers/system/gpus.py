"""Published peaks of graphics cards, from NVIDIA's data sheets and architecture papers.

Dense rates (half of those with sparsity). Consumer cards: bfloat16 with float32 accumulation, which is what
torch uses. None of them was measured here.
"""

from dataclasses import dataclass

import torch

from am_diffusers.system.text import suggest


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        memory: GiB.
        bf16: peak of bfloat16 and float16 matrix products, TFLOPS.
        tf32: peak of float32 products in TF32 (`allow_tf32`), TFLOPS.
        fp32: peak of float32 products, TFLOPS.
    """

    memory: float
    bf16: float
    tf32: float
    fp32: float

    def seconds(self, flops: dict[torch.dtype, int], *, utilisation: float, allow_tf32: bool) -> float:
        """Return the time that FLOPs by dtype take at a share of the peak."""
        single = self.tf32 if allow_tf32 else self.fp32
        rates = {dtype: single if dtype == torch.float32 else self.bf16 for dtype in flops}
        return sum(number / (rates[dtype] * 1e12) for dtype, number in flops.items()) / utilisation


GPUS = {
    "RTX 3090": Gpu(24, 71, 35.6, 35.6),
    "RTX 4090": Gpu(24, 165.2, 82.6, 82.6),
    "L4": Gpu(24, 121, 60, 30.3),
    "A10": Gpu(24, 125, 62.5, 31.2),
    "A100-40GB": Gpu(40, 312, 156, 19.5),
    "RTX A6000": Gpu(48, 154.8, 77.4, 38.7),
    "RTX 6000 Ada": Gpu(48, 364.2, 182.1, 91.1),
    "L40S": Gpu(48, 362, 183, 91.6),
    "A100-80GB": Gpu(80, 312, 156, 19.5),
    "H100 PCIe": Gpu(80, 756, 378, 51),
    "H100": Gpu(80, 989, 494, 67),
    "H200": Gpu(140, 989, 494, 67),
}


def find_gpu(name: str) -> Gpu:
    """Return a card by its name, in any case.

    Raises:
        ValueError: if it isn't in the table; names the nearest and all others.
    """
    by_name = {known.lower(): known for known in GPUS}
    if name.lower() not in by_name:
        raise ValueError(f"--gpu: unknown card {suggest(name, GPUS)}")
    return GPUS[by_name[name.lower()]]
