"""Fine-tuning methods, one file each; METHODS maps the name used in a config to the class."""

from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.base import Method
from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching

METHODS: dict[str, type[Method]] = {
    "adjoint_matching": AdjointMatching,
    "buffered_adjoint_matching": BufferedAdjointMatching,
}
