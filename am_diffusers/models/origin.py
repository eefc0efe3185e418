"""The run that a LoRA file names: the header of a safetensors file, read without its weights.

Our own keys begin with `am_diffusers.`; those that hubs and programs read follow Stability AI's ModelSpec
1.0.0 (github.com/Stability-AI/ModelSpec). There is no date: the same run writes the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from am_diffusers.system.files import sha256_of_bytes
from am_diffusers.system.resolution import Resolution

OWN, SPEC = "am_diffusers.", "modelspec."
SAMPLED = 1024


@dataclass(frozen=True)
class TrainedReward:
    """A reward that a LoRA was trained on, with its factor, mean and standard deviation in the sum."""

    name: str
    weight: float
    mean: float
    std: float


@dataclass(frozen=True)
class Origin:
    """The run that a LoRA comes from.

    Attributes:
        base_model: folder or hub id of the base model, as the run was told.
        base_model_sha256: `weights_sha256` of its network.
        method: name of the method.
        rewards: the trained rewards.
        divergence: name of the divergence that the aim is told by.
        reward_scale: factor of the reward in that aim.
        seed: seed of the run.
        iteration: optimizer steps taken.
        version: version of this package.
        negative_prompt: text that the guidance of the rollout led away from; None without guidance.
        init_lora: the LoRA that was put into the base model and that this one contains, as the run was told;
            None = none.
        init_lora_sha256: SHA-256 of its file, or of its two files for a PEFT folder.
    """

    base_model: str
    base_model_sha256: str
    method: str
    rewards: Sequence[TrainedReward]
    divergence: str
    reward_scale: float
    seed: int
    iteration: int
    version: str = version("am_diffusers")
    negative_prompt: str | None = None
    init_lora: str | None = None
    init_lora_sha256: Sequence[str] | None = None

    def metadata(self) -> dict[str, str]:
        """Return it as metadata of a safetensors file."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {f"{OWN}{k}": v if isinstance(v, str) else json.dumps(v) for k, v in known.items()}

    def summary(self) -> str:
        """Say in a few words what the run was."""
        rewards = " and ".join(reward.name for reward in self.rewards)
        return f"{self.method} on {rewards}, {self.iteration} iterations, seed {self.seed}"


def read_origin(file: Path) -> Origin | None:
    """Read the run that a LoRA file names; None for a file that names none, or is no such file."""
    about = read_about(file)
    found: dict[str, Any] = {k.removeprefix(OWN): text for k, text in about.items() if k.startswith(OWN)}
    try:
        for name in ("reward_scale", "seed", "iteration"):
            found[name] = json.loads(found[name])
        found["rewards"] = [TrainedReward(**reward) for reward in json.loads(found["rewards"])]
        if "init_lora_sha256" in found:
            found["init_lora_sha256"] = json.loads(found["init_lora_sha256"])
        return Origin(**found)
    except (KeyError, TypeError, ValueError):
        return None


def read_about(file: Path) -> dict[str, str]:
    """Read what a safetensors file says of its run and in ModelSpec's keys; {} if it can't be read."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
    return {key: text for key, text in metadata.items() if key.startswith((OWN, SPEC))}


def model_spec(*, architecture: str, title: str, description: str, resolution: Resolution) -> dict[str, str]:
    """Return ModelSpec's keys of a LoRA in the Diffusers format, without the hash, which `to_bytes` adds."""
    keys = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": "diffusers",
        "title": title,
        "description": description,
        "resolution": f"{resolution.width}x{resolution.height}",
    }
    return {SPEC + key: value for key, value in keys.items()}


def to_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose bytes depend on its content alone: safetensors shuffles the header.

    If the metadata has ModelSpec's keys, the SHA-256 of the tensors' bytes goes to `modelspec.hash_sha256`.
    """
    written = save(tensors)
    length = int.from_bytes(written[:8], "little")
    header, content = json.loads(written[8 : 8 + length]), written[8 + length :]
    about = dict(metadata)
    if f"{SPEC}sai_model_spec" in about:
        about[f"{SPEC}hash_sha256"] = f"0x{sha256_of_bytes(content)}"
    text = json.dumps({"__metadata__": dict(sorted(about.items())), **dict(sorted(header.items()))})
    encoded = text.encode() + b" " * (-len(text.encode()) % 8)  # tensors begin at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded + content


@torch.no_grad()
def weights_sha256(network: torch.nn.Module) -> str:
    """Return a SHA-256 that tells one base model from another in a moment, however large it is.

    It is of name, shape and the first `SAMPLED` values, as bfloat16, of each parameter but a LoRA's: the
    same whether a model is loaded in float32 or bfloat16, from one file or many, with a LoRA or not.
    """
    parts: list[bytes] = []
    base = {n.replace(".base_layer", ""): p for n, p in network.named_parameters() if ".lora_" not in n}
    for name, parameter in sorted(base.items()):
        sampled = parameter.reshape(-1)[:SAMPLED].to("cpu", torch.bfloat16).view(torch.int16)
        parts += [f"{name} {tuple(parameter.shape)}\n".encode(), sampled.numpy().tobytes()]
    return sha256_of_bytes(b"".join(parts))
