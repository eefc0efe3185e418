"""What a LoRA file says of its run and of its base model."""

import subprocess
import sys
from dataclasses import replace

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from am_diffusers.models.base import Model
from am_diffusers.models.export import ExportOptions, export_lora
from am_diffusers.models.origin import (
    Origin,
    TrainedReward,
    model_spec,
    read_about,
    read_origin,
    to_bytes,
    weights_sha256,
)
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.system.resolution import Resolution
from conftest import randomize

ORIGIN = Origin(
    base_model="owner/model",
    base_model_sha256="0" * 64,
    method="ram",
    rewards=[TrainedReward("pickscore", 0.5, 21.0, 2.0)],
    divergence="kl",
    reward_scale=3.0,
    seed=1,
    iteration=7,
)
SPEC = model_spec(
    architecture="stable-diffusion-3", title="fox", description="a LoRA", resolution=Resolution(64, 64)
)


def test_the_hash_of_a_base_model_is_of_its_weights_alone(tiny_sd3_dir):
    source = Pretrained(str(tiny_sd3_dir))
    bare, tuned, half = (Model.from_pretrained(source, text_and_vae=False) for _ in range(3))
    tuned.attach_lora(rank=2)
    torch.nn.Module.to(half.network, torch.bfloat16)
    expected = weights_sha256(bare.network)
    assert weights_sha256(tuned.network) == weights_sha256(half.network) == expected
    with torch.no_grad():
        bare.network.proj_out.bias[0] += 1
    assert weights_sha256(bare.network) != expected


def test_bytes_depend_on_content_alone_and_load(tmp_path):
    """In another process too, where sets and the library's own header have another order."""
    code = (
        "import torch; from am_diffusers.models.origin import to_bytes\n"
        "from am_diffusers.system.files import sha256_of_bytes as h\n"
        "t = {f'k{i}': torch.arange(i + 1.0) for i in range(5)}\n"
        "print(h(to_bytes(t, {c: c for c in 'abcdefgh'})))"
    )
    printed = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(printed) == 1
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(5).half()}
    written = to_bytes(tensors, {"x": "y"})
    assert int.from_bytes(written[:8], "little") % 8 == 0
    assert all(torch.equal(load(written)[name], tensors[name]) for name in tensors)


def test_an_export_keeps_what_its_lora_says(tiny_sd3_dir, tmp_path):
    base = Pretrained(str(tiny_sd3_dir))
    model = Model.from_pretrained(base, text_and_vae=False)
    model.attach_lora(rank=2)
    for name, weights in model.lora_parameters().items():
        randomize(torch.nn.ParameterList([weights]), len(name))
    file = model.save_lora(tmp_path / "lora", ORIGIN.metadata() | SPEC)
    assert read_origin(file) == ORIGIN
    for form in ("diffusers", "comfyui"):
        target = tmp_path / f"{form}.safetensors"
        export_lora(base, ExportOptions(file), target, form)
        assert read_origin(target) == ORIGIN
        assert read_about(target)["modelspec.implementation"] == form
        assert load_file(target)
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as opened:
        assert "lora_adapter_metadata" in opened.metadata()


def test_a_lora_names_the_one_that_it_contains(tmp_path):
    contains = replace(ORIGIN, init_lora="~/first", init_lora_sha256=["1" * 64, "2" * 64])
    for origin in (contains, ORIGIN):
        (tmp_path / "a.safetensors").write_bytes(to_bytes({"a": torch.zeros(1)}, origin.metadata()))
        assert read_origin(tmp_path / "a.safetensors") == origin
    assert {"am_diffusers.init_lora", "am_diffusers.init_lora_sha256"}.isdisjoint(ORIGIN.metadata())
    assert contains.metadata()["am_diffusers.init_lora"] == "~/first"


def test_other_files_name_no_run(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(to_bytes({"a": torch.zeros(1)}, {"am_diffusers.seed": "1"}))
    (tmp_path / "b.safetensors").write_text("no such file")
    assert [read_origin(tmp_path / f"{name}.safetensors") for name in "abc"] == [None] * 3
