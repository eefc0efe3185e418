"""A Stable Diffusion 3 model without weights, from its configuration files alone: what `estimate` runs."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.sd3 import SD3

TEXT_MODELS: dict[str, tuple[Any, Any]] = {
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
    "T5EncoderModel": (T5Config, T5EncoderModel),
}


def sd3_skeleton(source: Pretrained, weight_dtype: torch.dtype) -> SD3:
    """The model on the meta device, without text encoders.

    Args:
        source: where its configuration files are.
        weight_dtype: of the transformer; the VAE is float32.

    Raises:
        MissingModelError: if the configuration files can't be read.
    """
    parts: dict[str, Any] = {name: source.config(f"{name}/config.json") for name in ("transformer", "vae")}
    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel.from_config(parts["transformer"])
        vae: Any = AutoencoderKL.from_config(parts["vae"])
    # Not Diffusers' own `to`, which warns about modules of other models.
    torch.nn.Module.to(transformer, weight_dtype)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(
        source.config("scheduler/scheduler_config.json")
    )
    texts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        **texts,  # pyright: ignore[reportArgumentType]
    )
    return SD3(pipe, source=source)


def text_encoders(source: Pretrained) -> tuple[int, int]:
    """Number of weights of the text encoders together, and the tokens that the first one reads.

    Raises:
        MissingModelError: if the configuration files can't be read.
    """
    index = source.config("model_index.json")
    weights, tokens = 0, 77
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        kind = index.get(name, [None, None])[1]
        if kind is None:
            continue
        config_class, model_class = TEXT_MODELS[kind]
        config = config_class.from_dict(source.config(f"{name}/config.json"))
        with torch.device("meta"):
            weights += sum(parameter.numel() for parameter in model_class(config).parameters())
        tokens = config.max_position_embeddings if name == "text_encoder" else tokens
    return weights, tokens
