"""For `torch.distributed.run`: a sharded model against the whole one, equal weights, samples of their own."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.system.leaving import leaving_at_once
from pull_backs import vjp


def make_model(path: str, in_base: Path | None = None) -> Model:
    model = Model.from_pretrained(Pretrained(path))
    if in_base is not None:
        model.fuse_lora(in_base)
    model.attach_lora(rank=4, lora_alpha=8, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.lora_parameters().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def main() -> None:
    path, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    in_base = make_model(path).save_lora(f"{folder}/base{dist.get_rank()}")
    whole, sharded = make_model(path, in_base), make_model(path, in_base)
    sharded.shard(init_device_mesh("cpu", (dist.get_world_size(),)))
    frozen = [p for p in sharded.network.parameters() if not p.requires_grad]
    kept = sum(p.to_local().numel() for p in frozen) / sum(p.numel() for p in frozen)
    assert 0.45 < kept < 0.55, f"each of two processes holds half of the frozen weights, here {kept}"
    cond = whole.encode_prompts(["a fox", "red"], max_sequence_length=8)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(2, *whole.latent_shape(64, 64), generator=generator)
    sigma, cotangent = torch.tensor([0.5, 0.3]), torch.randn(x.shape, generator=generator)
    for _ in range(2):
        for field in ("base", "policy"):
            ours, theirs = getattr(sharded, field), getattr(whole, field)
            with torch.no_grad():
                assert torch.equal(ours(x, sigma, cond), theirs(x, sigma, cond))
            for a, b in zip(
                vjp(ours, x, sigma, cond, cotangent), vjp(theirs, x, sigma, cond, cotangent), strict=True
            ):
                assert torch.equal(a, b)
        for model in (sharded, whole):
            model.policy(x, sigma, cond).square().sum().backward()
        for name, parameter in sharded.lora_parameters().items():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, whole.lora_parameters()[name].grad), name
    files = [
        model.save_lora(f"{folder}/{name}{dist.get_rank()}") for name, model in (("s", sharded), ("w", whole))
    ]
    ours, theirs = (load_file(file) for file in files)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {len(value) for key, value in ours.items() if ".lora_A." in key} == {4 + 4}  # both LoRAs
    dist.destroy_process_group()
    print("equal")  # noqa: T201


if __name__ == "__main__":
    with leaving_at_once():
        main()
