"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer predicts `noise - clean` at `1000 * sigma`."""

import re
from typing import Any

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
    calculate_shift,
)
from torch import Tensor

from am_diffusers.models.family import Config, Encoded, Family, Shape
from am_diffusers.models.schedulers import scheduler_sigmas
from am_diffusers.velocity import Conditioning

# The eight projections of MMDiT's joint attention, the default of the Diffusers SD3 LoRA script.
# SD3.5's second, image-only attention (`attn2`) is reached by naming it: "attn2.to_q", ...
_JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
# Of the blocks' layers those that ComfyUI keeps as they are, or as parts of one fused qkv matrix. The last
# block's text modulation is stored in another order there.
_COMFYUI_MODULE = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn2?\.(to_[qkv]|to_out\.0)|attn\.(add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    if cond.embeddings is None or cond.pooled is None:
        raise ValueError("SD3 needs prompt embeddings: make the conditioning with `encode_prompts`")
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond.embeddings.to(x),
        pooled_projections=cond.pooled.to(x),
        return_dict=False,
    )[0]


def _encode(pipe: Any, texts: list[str], max_sequence_length: int) -> list[Encoded]:
    """Encode by CLIP, CLIP and T5; a pipeline without T5 has zeros as its `max_sequence_length` tokens."""
    embeddings, _, pooled, _ = pipe.encode_prompt(
        prompt=texts,
        prompt_2=texts,
        prompt_3=texts,
        device=pipe.transformer.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return [Encoded(*rows) for rows in zip(embeddings, pooled, strict=True)]


def _decode(vae: Any, latents: Tensor) -> Tensor:
    scaled = latents / vae.config["scaling_factor"]
    return vae.decode(scaled + vae.config["shift_factor"], return_dict=False)[0]


def _mu(config: Config, shape: Shape, num_steps: int) -> float | None:
    """Return it as the pipeline does: linear in the number of patches; these defaults are its own."""
    scheduler, patch = config("scheduler"), config("transformer")["patch_size"]
    if not scheduler.get("use_dynamic_shifting"):
        return None
    return calculate_shift(
        (shape[-2] // patch) * (shape[-1] // patch),
        scheduler.get("base_image_seq_len", 256),
        scheduler.get("max_image_seq_len", 4096),
        scheduler.get("base_shift", 0.5),
        scheduler.get("max_shift", 1.16),
    )


def _vae_scale(config: Config) -> int:
    return 2 ** (len(config("vae")["block_out_channels"]) - 1)


def _multiple(config: Config) -> int:
    return _vae_scale(config) * config("transformer")["patch_size"]


def _resolution(config: Config) -> int:
    return _vae_scale(config) * config("transformer")["sample_size"]


def _latent_shape(config: Config, height: int, width: int) -> Shape:
    transformer, multiple, scale = config("transformer"), _multiple(config), _vae_scale(config)
    largest = multiple * transformer["pos_embed_max_size"]
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % multiple:
            below = max(size // multiple, 1) * multiple
            above = min((max(size, 0) // multiple + 1) * multiple, largest)
            raise ValueError(f"{name} {size} is not a multiple of {multiple} pixels: use {below} or {above}")
        if size > largest:
            raise ValueError(f"{name} {size} is beyond the model's positions: use {largest} or less")
    return transformer["in_channels"], height // scale, width // scale


def _prompt_shapes(config: Config, max_sequence_length: int) -> dict[str, Shape]:
    """Return those of CLIP's and T5's tokens one after the other, and of both CLIPs' pooled embeddings."""
    transformer = config("transformer")
    tokens = config("text_encoder").get("max_position_embeddings", 77) + max_sequence_length
    return {
        "embeddings": (tokens, transformer["joint_attention_dim"]),
        "pooled": (transformer["pooled_projection_dim"],),
    }


def _architecture(config: Config) -> str:
    """Return the name as trainers of SD3 LoRAs write it; the released models differ in depth and `attn2`."""
    transformer = config("transformer")
    size = {24: "medium", 38: "large"}.get(transformer["num_layers"])
    newer = bool(transformer.get("dual_attention_layers")) or size == "large"
    return "-".join(["stable-diffusion", "3.5" if newer else "3", *([size] if size else [])])


def _comfyui(module: str) -> str | None:
    """Return the OneTrainer name, which ComfyUI maps for SD3."""
    return f"lora_transformer_{module.replace('.', '_')}" if _COMFYUI_MODULE.fullmatch(module) else None


SD3 = Family(
    pipeline=StableDiffusion3Pipeline,
    network="transformer",
    text_components=tuple(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")),
    lora_layers=_JOINT_ATTENTION,
    velocity=_velocity,
    encode=_encode,
    decode=_decode,
    mu=_mu,
    sigmas=scheduler_sigmas,
    latent_shape=_latent_shape,
    multiple=_multiple,
    resolution=_resolution,
    prompt_shapes=_prompt_shapes,
    longest_prompt=512,
    tokenizers=lambda length: {"CLIP": ("tokenizer", None), "T5": ("tokenizer_3", length)},
    call=lambda guidance, length: {"max_sequence_length": length, "guidance_scale": guidance},
    architecture=_architecture,
    comfyui=_comfyui,
)
