"""A model family's own facts and functions: everything that `Model` cannot know of a Diffusers pipeline.

A family is a record of stateless functions of a pipeline's components or of their configurations. `Model`
moves, casts, caches and clamps; what is the same for all families isn't here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from am_diffusers.velocity import Conditioning

Config = Callable[[str], Mapping[str, Any]]
"""The configuration of a pipeline's component, such as `vae`, by its name."""
Shape = tuple[int, ...]


class Encoded(NamedTuple):
    """One encoded prompt as it is kept, None where the family has no such thing.

    Attributes:
        embeddings: token embeddings, (tokens, dim).
        pooled: pooled embeddings, (dim,).
        mask: which tokens are part of the prompt, (tokens,).
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """Pipelines that share their architecture.

    Attributes:
        pipeline: the class of Diffusers that loads a folder and reads and writes LoRA files.
        network: the trained component, `transformer` or `unet`; also the prefix of LoRA keys.
        text_components: components that encode prompts; a pipeline runs without them.
        lora_layers: endings of the names of the linear layers that get a LoRA by default.
        velocity: function of (network, x, sigma, cond), `x` (B, ...) in the dtype of the weights, `sigma`
            (B,); a ValueError if `cond` lacks what the network is conditioned on.
        encode: (pipe, texts, max_sequence_length) to what is kept of each text.
        decode: (vae, latents) to images (B, 3, H, W) in [-1, 1], or frames (B, 3, F, H, W); not clamped.
        mu: (config, shape, num_steps) to the shift of noise levels that the pipeline computes for latents of
            a shape, where its scheduler has dynamic shifting; None = the scheduler's is fixed.
        sigmas: (scheduler, num_steps, mu, stochastic) to noise levels (num_steps + 1,), float64, 1 to 0: of a
            stochastic table, or the pipeline's own. The scheduler is left as is.
        latent_shape: shape of an image's latents, (config, height, width) in pixels; a ValueError that names
            the nearest size if the model cannot make that one.
        multiple: (config) to the number of pixels that height and width are multiples of.
        resolution: (config) to the side in pixels of the square images that the model was made for.
        prompt_shapes: (config, max_sequence_length) to the shape of each part of `Encoded` that is there.
        longest_prompt: largest max_sequence_length that the pipeline takes, in tokens.
        tokenizers: (max_sequence_length) to each tokenizer's folder and limit by its name; None = its own.
        call: (guidance_scale, max_sequence_length) to arguments of the pipeline's call that mean the same.
        architecture: (config) to the model's name in the ModelSpec of safetensors files, without `/lora`.
        comfyui: ComfyUI's name for a LoRA on a module of the network; None if it may be read otherwise.
    """

    pipeline: type[Any]
    network: str
    text_components: tuple[str, ...]
    lora_layers: tuple[str, ...]
    velocity: Callable[[Any, Tensor, Tensor, Conditioning], Tensor]
    encode: Callable[[Any, list[str], int], list[Encoded]]
    decode: Callable[[Any, Tensor], Tensor]
    mu: Callable[[Config, Shape, int], float | None]
    sigmas: Callable[[Any, int, float | None, bool], Tensor]
    latent_shape: Callable[[Config, int, int], Shape]
    multiple: Callable[[Config], int]
    resolution: Callable[[Config], int]
    prompt_shapes: Callable[[Config, int], dict[str, Shape]]
    longest_prompt: int
    tokenizers: Callable[[int], dict[str, tuple[str, int | None]]]
    call: Callable[[float, int], dict[str, float]]
    architecture: Callable[[Config], str]
    comfyui: Callable[[str], str | None]

    def check_length(self, max_sequence_length: int) -> None:
        """Raise a ValueError unless the pipeline takes prompts of this number of tokens."""
        if not 1 <= max_sequence_length <= self.longest_prompt:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, expected 1 to {self.longest_prompt}"
            )
