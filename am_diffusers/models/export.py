"""A trained LoRA in the forms of other programs, each proved by loading it back.

- `diffusers`: what `StableDiffusion3Pipeline.load_lora_weights` reads.
- `comfyui`: keys `lora_transformer_<module with _>.lora_up.weight`, `.lora_down.weight` and `.alpha`, the
  OneTrainer names that ComfyUI's loader maps for SD3; it applies `W + alpha / rank * up @ down`.
- `merged`: the base pipeline with `W + scale * B A` as its weights, read by plain `from_pretrained`.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from am_diffusers.models import lora
from am_diffusers.models.pretrained import Pretrained

# Of the blocks' layers those that ComfyUI keeps as they are, or as parts of one fused qkv matrix. The last
# block's text modulation is stored in another order there.
_COMFYUI_MODULE = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn2?\.(to_[qkv]|to_out\.0)|attn\.(add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
# Relative to the LoRA's effect, in float32: rounding of one forward pass. A merged half-precision file also
# rounds every weight to 8 (bfloat16) or 11 (float16) bits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class ExportOptions:
    """What is exported.

    Attributes:
        lora_path: the LoRA file, or a folder that holds `pytorch_lora_weights.safetensors`.
        scale: strength of the LoRA in the export; not 0.
        dtype: of a merged pipeline's transformer and text encoders; LoRA files are float32.
    """

    lora_path: Path
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Proof:
    """How an export, loaded back, compares at a fixed input.

    Attributes:
        effect: largest change of the velocity by the LoRA, relative to the largest velocity.
        error: largest difference between export and tuned model, relative to the LoRA's largest change.
    """

    effect: float
    error: float


def export_lora(base: Pretrained, options: ExportOptions, target: Path, form: str) -> Proof:
    """Write `target` (a file, or a folder for `merged`) and prove it; an export that fails leaves nothing.

    Args:
        base: the model the LoRA was trained on.
        options: what to export.
        target: must not exist.
        form: a key of `FORMS`.

    Raises:
        ValueError: if the LoRA is no LoRA of this base, changes nothing, can't be told in this form, the
            target exists, or what was written doesn't make the tuned model's output.
    """
    writer, suffix = FORMS[form], "" if form == "merged" else ".safetensors"
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or choose another name")
    if target.suffix != suffix and suffix:
        raise ValueError(f"{target} must end in {suffix}")
    if options.scale == 0:
        raise ValueError("--scale 0 is the base model: choose the strength of the LoRA, 1 as trained")
    before, after = _outputs(base, options)
    size, change = before.abs().max().item(), (after - before).abs().max().item()
    if not change > 0:
        raise ValueError(f"{options.lora_path} does not change the model's output: was it trained at all?")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
        written = Path(staging) / target.name
        exported = writer(base, options, written)
        error = (exported - after).abs().max().item() / change
        if not error <= TOLERANCE[options.dtype if form == "merged" else torch.float32]:
            raise ValueError(
                f"loaded back, the {form} export differs from the tuned model by {error:.1e} of the LoRA's "
                f"change{_remedy(form, options.dtype)}"
            )
        written.rename(target)
    return Proof(change / size, error)


@torch.no_grad()
def probe(transformer: SD3Transformer2DModel) -> Tensor:
    """Velocity of a transformer, which becomes float32, at two fixed random inputs on the CPU."""
    config: Any = transformer.float().eval().config
    draw = torch.Generator().manual_seed(0)
    side = 4 * config["patch_size"]
    return transformer(
        hidden_states=torch.randn(2, config["in_channels"], side, side, generator=draw),
        encoder_hidden_states=torch.randn(2, 8, config["joint_attention_dim"], generator=draw),
        pooled_projections=torch.randn(2, config["pooled_projection_dim"], generator=draw),
        timestep=torch.tensor([300.0, 900.0]),
        return_dict=False,
    )[0]


def _transformer(base: Pretrained) -> SD3Transformer2DModel:
    return base.load(torch.float32, text_and_vae=False).transformer


def _tuned(base: Pretrained, options: ExportOptions) -> SD3Transformer2DModel:
    transformer = _transformer(base)
    lora.load_lora(transformer, options.lora_path, scale=options.scale)
    return transformer


def _outputs(base: Pretrained, options: ExportOptions) -> tuple[Tensor, Tensor]:
    """Velocities of the base and of the tuned model."""
    transformer = _tuned(base, options)
    with lora.adapters(transformer, enabled=False):
        before = probe(transformer)
    return before, probe(transformer)


def _write_diffusers(base: Pretrained, options: ExportOptions, file: Path) -> Tensor:
    saved = lora.save_lora(_tuned(base, options), file.parent)
    saved.rename(file)
    pipe = base.load(torch.float32, text_and_vae=False)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return probe(pipe.transformer)


def _write_comfyui(base: Pretrained, options: ExportOptions, file: Path) -> Tensor:
    state: dict[str, Tensor] = {}
    for name, layer in lora.lora_layers(_tuned(base, options)).items():
        if not _COMFYUI_MODULE.fullmatch(name):
            raise ValueError(
                f"ComfyUI may read a LoRA on {name} otherwise than Diffusers: use --format diffusers or "
                "merged"
            )
        down, up = lora.scaled_weights(layer)
        key = f"lora_transformer_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = down.cpu().contiguous()
        state[f"{key}.lora_up.weight"] = up.cpu().contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(len(down)))  # the scaling is in `up`
    save_file(state, file, metadata={"format": "pt"})
    transformer = _transformer(base)
    apply_comfyui(transformer, load_file(file))
    return probe(transformer)


@torch.no_grad()
def apply_comfyui(transformer: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Add a LoRA in the `comfyui` form to the weights of a transformer.

    Raises:
        ValueError: if a key belongs to no linear layer.
    """
    linear = {
        f"lora_transformer_{name.replace('.', '_')}": module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    unknown = {key.split(".")[0] for key in state} - set(linear)
    if unknown:
        raise ValueError(f"no layer for {sorted(unknown)[0]} in this base model")
    for key in {key.split(".")[0] for key in state}:
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        linear[key].weight += state[f"{key}.alpha"].item() / len(down) * up @ down


def _write_merged(base: Pretrained, options: ExportOptions, folder: Path) -> Tensor:
    merged = _tuned(base, options)
    merged.fuse_lora(safe_fusing=True)  # at the scale that `load_lora` set
    merged.unload_lora()
    torch.nn.Module.to(merged, options.dtype)
    pipe = base.load(options.dtype)
    pipe.register_modules(transformer=merged)
    pipe.save_pretrained(folder)
    return probe(Pretrained(str(folder)).load(options.dtype).transformer)


def _remedy(form: str, dtype: torch.dtype) -> str:
    if form == "merged" and dtype != torch.float32:
        return f": {dtype} is too coarse for a change this small, use --dtype float32 or a LoRA file"
    return "; please report this"


FORMS: dict[str, Callable[[Pretrained, ExportOptions, Path], Tensor]] = {
    "diffusers": _write_diffusers,
    "comfyui": _write_comfyui,
    "merged": _write_merged,
}
