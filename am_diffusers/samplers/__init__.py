"""Samplers of laws known only by their energy, one file a sampler; `energies` has the laws."""

from am_diffusers.samplers.adjoint_sampling import AdjointSampling
from am_diffusers.samplers.asbs import ASBS
from am_diffusers.samplers.base import Sampler
from am_diffusers.samplers.naas import NAAS

SAMPLERS: dict[str, type[Sampler]] = {
    "adjoint_sampling": AdjointSampling,
    "asbs": ASBS,
    "naas": NAAS,
}
