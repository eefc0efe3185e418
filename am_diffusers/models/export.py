"""A trained LoRA in the forms of other programs, each proved by loading it back.

- `diffusers`: what the pipeline's `load_lora_weights` reads.
- `comfyui`: keys `<name>.lora_up.weight`, `.lora_down.weight` and `.alpha`, with a name of the module that
  ComfyUI's loader maps for the family; it applies `W + alpha / rank * up @ down`.
- `merged`: the base pipeline with `W + scale * B A` as its weights, read by plain `from_pretrained`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from am_diffusers.models.base import Model, without_weights
from am_diffusers.models.lora_files import find_lora
from am_diffusers.models.origin import SPEC, read_about, to_bytes
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.proof import Proof, compare, random_point
from am_diffusers.system.files import open_to_umask, write_whole

# Relative to the LoRA's effect, in float32: rounding of one forward pass. A merged half-precision file also
# rounds every weight to 8 (bfloat16) or 11 (float16) bits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class ExportOptions:
    """A finished export.

    Attributes:
        lora_path: a LoRA file of any form of `lora_files`, or a folder that holds one.
        scale: strength of the LoRA in the export; not 0.
        dtype: dtype of a merged pipeline's transformer and text encoders; LoRA files are float32.
    """

    lora_path: Path
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


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
    without_weights(base).load_lora(options.lora_path)
    before, after = _outputs(base, options)
    compare(options.lora_path, before, after, after)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
        written = Path(staging) / target.name
        proof = compare(options.lora_path, before, after, writer(base, options, written))
        if not proof.error <= TOLERANCE[options.dtype if form == "merged" else torch.float32]:
            raise ValueError(
                f"loaded back, the {form} export differs from the tuned model by {proof.error:.1e} of the "
                f"LoRA's change{_remedy(form, options.dtype)}"
            )
        written.rename(target)
    return proof


@torch.no_grad()
def _velocity(model: Model) -> Tensor:
    return model.policy(*random_point(model))


@torch.no_grad()
def _outputs(base: Pretrained, options: ExportOptions) -> tuple[Tensor, Tensor]:
    """Return velocities of the base and of the tuned model."""
    model = _tuned(base, options)
    point = random_point(model)
    return model.base(*point), model.policy(*point)


def _base(source: Pretrained) -> Model:
    return Model.from_pretrained(source, text_and_vae=False)


def _tuned(base: Pretrained, options: ExportOptions) -> Model:
    model = _base(base)
    model.load_lora(options.lora_path, scale=options.scale)
    return model


def _write_diffusers(base: Pretrained, options: ExportOptions, file: Path) -> Tensor:
    _tuned(base, options).save_lora(file.parent, _about(options)).rename(file)
    model = _base(base)
    model.pipeline().load_lora_weights(str(file.parent), weight_name=file.name)
    return _velocity(model)


def _write_comfyui(base: Pretrained, options: ExportOptions, file: Path) -> Tensor:
    state: dict[str, Tensor] = {}
    for name, (down, up) in _tuned(base, options).lora_change().items():
        key = base.family.comfyui(name)
        if key is None:
            raise ValueError(
                f"ComfyUI may read a LoRA on {name} otherwise than Diffusers: use --format diffusers or "
                "merged"
            )
        state[f"{key}.lora_down.weight"] = down.contiguous()
        state[f"{key}.lora_up.weight"] = up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(len(down)))  # the scaling is in `up`
    about = _about(options)
    if about:
        about[f"{SPEC}implementation"] = "comfyui"
    content = to_bytes(state, {"format": "pt"} | about)
    write_whole(file, lambda part: part.write_bytes(content))
    model = _base(base)
    _apply_comfyui(model, load_file(file))
    return _velocity(model)


def _about(options: ExportOptions) -> dict[str, str]:
    return read_about(find_lora(options.lora_path))


@torch.no_grad()
def _apply_comfyui(model: Model, state: dict[str, Tensor]) -> None:
    """Add a LoRA in the `comfyui` form to the weights of a model."""
    modules = {model.family.comfyui(name): module for name, module in model.network.named_modules()}
    for key in {key.split(".")[0] for key in state}:
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        modules[key].weight += state[f"{key}.alpha"].item() / len(down) * up @ down


def _write_merged(base: Pretrained, options: ExportOptions, folder: Path) -> Tensor:
    model = _tuned(base, options)
    merged, name = model.network, model.family.network
    merged.fuse_lora(safe_fusing=True)  # at the scale that `load_lora` set
    merged.unload_lora()
    torch.nn.Module.to(merged, options.dtype)
    pipe = base.load(options.dtype)
    pipe.register_modules(**{name: merged})
    pipe.save_pretrained(folder)
    open_to_umask(folder)
    written = Pretrained(str(folder))
    loaded = written.load(options.dtype)
    getattr(loaded, name).float()
    return _velocity(Model(loaded, written.family, source=written))


def _remedy(form: str, dtype: torch.dtype) -> str:
    if form == "merged" and dtype != torch.float32:
        return f": {dtype} is too coarse for a change this small, use --dtype float32 or a LoRA file"
    return "; please report this"


FORMS: dict[str, Callable[[Pretrained, ExportOptions, Path], Tensor]] = {
    "diffusers": _write_diffusers,
    "comfyui": _write_comfyui,
    "merged": _write_merged,
}
