"""The control of the policy: a LoRA on the attention projections of an SD3 transformer.

The effective weight is `W + scaling * B A` with `scaling = lora_alpha / rank` (LoRA, arXiv 2106.09685).
Files are in the format of `StableDiffusion3Pipeline.load_lora_weights`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
# The eight projections of MMDiT's joint attention, the default of the Diffusers SD3 LoRA script.
# SD3.5's second, picture-only attention (`attn2`) is reached by naming it: "attn2.to_q", ...
DEFAULT_LORA_LAYERS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_KEY = re.compile(r"transformer\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@contextmanager
def adapters(transformer: torch.nn.Module, *, enabled: bool) -> Iterator[None]:
    """Run with every adapter on or off; the previous state comes back on exit.

    peft's own switch (`enable_adapters`) also flips `requires_grad` of the adapter weights, under the
    feet of the optimizer and of DistributedDataParallel; this one flips only what the forward pass reads.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = not enabled
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def lora_layers(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a transformer by module name; empty without a LoRA."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def attach_lora(
    transformer: SD3Transformer2DModel,
    *,
    rank: int = 32,
    lora_alpha: int = 64,
    layers: Sequence[str] = DEFAULT_LORA_LAYERS,
    seed: int = 0,
) -> None:
    """Add a trainable float32 LoRA that starts as the identity (B = 0, A normal with std 1/rank).

    Rank 32 and alpha 64 are the SD3.5-medium setting of Flow-GRPO (arXiv 2505.05470).

    Args:
        transformer: changed in place.
        rank: inner dimension of A and B, at least 1.
        lora_alpha: scaling times rank.
        layers: endings of the names of the linear layers that get a LoRA.
        seed: of A; the global generators are left as they were.

    Raises:
        ValueError: if a LoRA is there already, or one of `layers` matches nothing.
    """
    _check_free(transformer)
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise ValueError(
                f"no linear layer ends in {layer!r}; the default layers are {DEFAULT_LORA_LAYERS}"
            )
    config = LoraConfig(
        r=rank, lora_alpha=lora_alpha, target_modules=list(layers), init_lora_weights="gaussian"
    )
    devices = [transformer.device] if transformer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        transformer.add_adapter(config, ADAPTER)
    cast_training_params(transformer, torch.float32)


def save_lora(transformer: SD3Transformer2DModel, folder: str | Path) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` for `StableDiffusion3Pipeline.load_lora_weights`.

    The SD3 loader takes lora_alpha = rank when a file has no metadata, so the scaling is multiplied
    into B and the metadata says lora_alpha = rank: the same strength with and without metadata.

    Returns:
        The path of the file.
    """
    layers = lora_layers(transformer)
    # Not `transformer.state_dict()`: on one process alone it would put sharded weights out of step.
    own = {name: p for name, p in transformer.named_parameters() if ".lora_" in name}
    state = get_peft_model_state_dict(transformer, state_dict=own, adapter_name=ADAPTER)
    for key in [key for key in state if ".lora_B." in key]:
        state[key] = state[key] * layers[key.split(".lora_B.")[0]].scaling[ADAPTER]
    metadata = transformer.peft_config[ADAPTER].to_dict()
    metadata |= {"lora_alpha": metadata["r"], "alpha_pattern": metadata["rank_pattern"], "use_rslora": False}
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={key: value.detach().cpu().contiguous() for key, value in state.items()},
        transformer_lora_adapter_metadata=metadata,
    )
    return Path(folder) / LORA_FILE


def load_lora(transformer: SD3Transformer2DModel, path: str | Path, *, scale: float = 1.0) -> None:
    """Load a LoRA file in the Diffusers format into a transformer without one; weights become float32.

    Args:
        transformer: changed in place.
        path: the file, or a folder that holds `pytorch_lora_weights.safetensors`.
        scale: multiplies the change the LoRA makes; 0 gives the base.

    Raises:
        ValueError: if the file is missing, holds a key this model has no use for, belongs to another
            base model, or a LoRA is attached already.
    """
    _check_free(transformer)
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"no LoRA file {file}: pass a .safetensors file, or a folder that holds {LORA_FILE}")
    try:
        state, metadata = StableDiffusion3Pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the LoRA file {file} ({error}): copy or export it again") from error
    modules = _check_keys(state, transformer, file)
    StableDiffusion3Pipeline.load_lora_into_transformer(
        state, transformer=transformer, adapter_name=ADAPTER, metadata=metadata
    )
    if set(lora_layers(transformer)) != modules:
        raise ValueError(f"{file}: its metadata and its weights name different layers; export it again")
    transformer.set_adapters(ADAPTER, scale)
    cast_training_params(transformer, torch.float32)


def set_lora_scale(transformer: SD3Transformer2DModel, scale: float) -> None:
    """Change the strength of a LoRA: the same as loading it with this `scale`, whatever it was before.

    Raises:
        ValueError: if there is no LoRA or `scale` isn't finite.
    """
    _check_attached(transformer)
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite scale of the LoRA, got {scale}")
    transformer.set_adapters(ADAPTER, scale)


def unload_lora(transformer: SD3Transformer2DModel) -> None:
    """Remove the LoRA; the transformer is the base again, bit for bit.

    Raises:
        ValueError: if there is no LoRA.
    """
    _check_attached(transformer)
    transformer.unload_lora()


def _check_attached(transformer: torch.nn.Module) -> None:
    if not lora_layers(transformer):
        raise ValueError("this transformer has no LoRA: load one first")


def _check_free(transformer: torch.nn.Module) -> None:
    if lora_layers(transformer):
        raise ValueError(
            "this transformer has a LoRA already: unload it, or start from a freshly loaded model"
        )


def _check_keys(state: dict[str, Tensor], transformer: SD3Transformer2DModel, file: Path) -> set[str]:
    """Names of the modules a LoRA file changes; every key must fit a linear layer of `transformer`."""
    linear = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in linear:
            raise ValueError(
                f"{file}: no place for key {key!r} here, expected transformer.<layer>.lora_A.weight; "
                "export the LoRA with StableDiffusion3Pipeline.save_lora_weights"
            )
        parts.setdefault(match["module"], {})[match["part"]] = value
    for name, part in parts.items():
        expected = (linear[name].out_features, linear[name].in_features)
        if set(part) != {"A", "B"}:
            raise ValueError(f"{file}: {name} lacks lora_A or lora_B: the file is incomplete, export again")
        if (part["B"].shape[0], part["A"].shape[1]) != expected:
            raise ValueError(
                f"{file}: {name} is {part['B'].shape[0]} x {part['A'].shape[1]}, this base model has "
                f"{expected[0]} x {expected[1]}: load it with the base model it was trained on"
            )
    return set(parts)


def scaled_weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a layer in float32, the scaling multiplied into B."""
    (name,) = layer.active_adapters
    a, b = (part[name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a.detach().float(), b.detach().float() * layer.scaling[name]
