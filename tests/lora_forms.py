"""One LoRA with alpha != rank in every form that is read, and files that must be refused."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from am_diffusers.models.base import Model
from am_diffusers.models.export import ExportOptions, export_lora
from am_diffusers.models.pretrained import Pretrained
from families import strong_lora

OWN = "pytorch_lora_weights.safetensors"
FORMS = ("peft", "peft_file", "kohya", "alphas", "metadata", "comfyui")


def raw_weights(model: Model) -> dict[str, Tensor]:
    """A and B of every layer as peft has them, the strength not in them."""
    state = model.lora_parameters()
    return {key.replace(".default", ""): value.detach().contiguous() for key, value in state.items()}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replace each text of `names` in each key."""
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def write_forms(base: Path, folder: Path, *, rank: int = 4, alpha: int = 8) -> dict[str, Path]:
    """Write a strong LoRA of the pipeline in `base` in every form; `own` is as this program writes it."""
    source = Pretrained(str(base))
    model = strong_lora(Model.from_pretrained(source), rank=rank, lora_alpha=alpha)
    own, state = model.save_lora(folder / "own"), raw_weights(model)
    found = {"own": own, "peft": folder / "peft", "peft_file": folder / "peft/adapter_model.safetensors"}
    found |= {name: folder / f"{name}.safetensors" for name in ("kohya", "alphas", "metadata", "comfyui")}

    peft = get_peft_model(Model.from_pretrained(source).network, peft_config(model, rank, alpha))
    own_names = {key.replace(".default", ""): p for key, p in peft.named_parameters() if ".lora_" in key}
    for key, value in state.items():
        own_names[f"base_model.model.{key}"].data = value.clone()
    peft.save_pretrained(str(found["peft"]))

    prefixed = {f"transformer.{key}": value for key, value in state.items()}
    modules = {key.split(".lora_")[0] for key in prefixed}
    alphas = {f"{module}.alpha": torch.tensor(float(alpha)) for module in modules}
    save_file(prefixed | alphas, found["alphas"])
    kohya = renamed(prefixed, {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."})
    save_file(kohya | alphas, found["kohya"])
    metadata = {"transformer_lora_adapter_metadata": model.network.peft_config["default"].to_dict()}
    pipeline, layers = model.family.pipeline, {"transformer_lora_layers": state}
    pipeline.save_lora_weights(folder / "metadata", **layers, **metadata)
    (folder / "metadata" / OWN).rename(found["metadata"])
    export_lora(source, ExportOptions(own), found["comfyui"], "comfyui")
    return found


def peft_config(model: Model, rank: int, alpha: int) -> LoraConfig:
    layers = list(model.family.lora_layers)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)


def bad_files(own: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that no command may take, each with what its error must say."""
    state = load_file(own)
    q = "transformer.transformer_blocks.0.attn.to_q"
    block = {"transformer.": "diffusion_model.", "transformer_blocks.": "joint_blocks."}
    states = {
        "dora": (state | {f"{q}.dora_scale": torch.ones(32, 1)}, "is a DoRA"),
        "peft_dora": (state | {f"{q}.lora_magnitude_vector": torch.ones(32)}, "is a DoRA"),
        "loha": ({f"{q}.hada_w1_a": torch.ones(32, 4)}, "is a LoHa"),
        "lokr": ({f"{q}.lokr_w1": torch.ones(4, 4)}, "is a LoKr"),
        "difference": (state | {f"{q}.diff": torch.ones(32, 32)}, "no place for key"),
        "native": (renamed(state, block), "no place for key 'diffusion_model.joint_blocks"),
        "kohya_native": (
            {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(4, 32)},
            "no place for key 'lora_unet_joint_blocks",
        ),
        "text": (state | {"text_encoder.x.q_proj.lora_A.weight": torch.ones(4, 32)}, "a text encoder"),
        "kohya_text": (state | {"lora_te1_x_q_proj.lora_down.weight": torch.ones(4, 32)}, "a text encoder"),
        "wide": (
            {k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in state.items()},
            "64 x 64, this base model has 32 x 32",
        ),
        "deep": (
            state | {key.replace("blocks.0", "blocks.7"): value for key, value in state.items()},
            "has no layer transformer_blocks.7",
        ),
        "half": ({k: v for k, v in state.items() if k != f"{q}.lora_B.weight"}, "lacks"),
        "ranks": (
            {k: v[:2] if k == f"{q}.lora_A.weight" else v for k, v in state.items()},
            "not of one rank",
        ),
        "nan": ({k: v * float("nan") for k, v in state.items()}, "not finite"),
        "empty": ({}, "holds no LoRA"),
    }
    found = {}
    for name, (tensors, message) in states.items():
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
        found[name] = folder / f"{name}.safetensors", message
    whole = own.read_bytes()
    contents = {
        "cut": (whole[: len(whole) // 2], "cannot read the LoRA file"),
        "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        "nothing": (b"", "cannot read the LoRA file"),
    }
    for name, (content, message) in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        found[name] = folder / f"{name}.safetensors", message
    (folder / "pickle").mkdir()
    (folder / "pickle/adapter_model.bin").write_bytes(b"PK")
    return found | {
        "missing": (folder / "nowhere", "no LoRA file"),
        "pickle": (folder / "pickle", "no LoRA file"),
    }
