"""Compared models: the base and LoRAs, each at a scale, a number of steps and a guidance scale."""

from dataclasses import dataclass, replace
from pathlib import Path

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """One model that makes images.

    Attributes:
        name: `base`, or a LoRA's name, unique in an evaluation; letters, digits, `.`, `_`, `-`.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance, 1.0 = off.
        lora: file or folder of the LoRA; None = the base.
        lora_scale: strength of the LoRA; 0 would be the base.
    """

    name: str
    num_inference_steps: int
    guidance_scale: float = 1.0
    lora: Path | None = None
    lora_scale: float = 1.0

    @property
    def is_base(self) -> bool:
        """True if it has no LoRA."""
        return self.lora is None

    @property
    def key(self) -> str:
        """Name of its folder: contains everything that distinguishes candidates of one evaluation."""
        strength = "" if self.is_base else f"-scale{self.lora_scale:g}"
        return f"{self.name}{strength}-steps{self.num_inference_steps}-guidance{self.guidance_scale:g}"

    @property
    def base(self) -> "Candidate":
        """The base with the same sampler, which this candidate is compared with."""
        return replace(self, name=BASE, lora=None, lora_scale=1.0)
