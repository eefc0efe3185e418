"""Exports of a LoRA, each read by what it is for and held against the tuned model."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from am_diffusers.models import export
from am_diffusers.models.adapters import ADAPTER, lora_layers
from am_diffusers.models.base import Model
from am_diffusers.models.export import FORMS, ExportOptions, export_lora
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.proof import Proof, random_point
from am_diffusers.models.sd3 import SD3
from conftest import randomize, tiny_pipeline
from families import direct

SCRIPT = Path(__file__).parents[2] / "scripts/export_lora.py"
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
SECOND_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def train(pipe: StableDiffusion3Pipeline, folder: Path, layers: tuple[str, ...]) -> None:
    """Write a LoRA of `pipe` to `folder` as after a training that changed a lot."""
    model = Model(pipe, SD3)
    model.attach_lora(rank=4, lora_alpha=8, layers=layers)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.lora_parameters().values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_lora(folder)


@torch.no_grad()
def probe(pipe: StableDiffusion3Pipeline) -> Tensor:
    """The velocity of a plain pipeline where exports are proved."""
    return direct(pipe.transformer.float(), *random_point(Model(pipe, SD3)))


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `lora` of a pipeline of each kind; that of SD3.5 has a second attention and a T5."""
    folder = tmp_path_factory.mktemp(request.param)
    new = request.param == "sd3.5"
    pipe = tiny_pipeline(t5=new)
    layers = (*SD3.lora_layers, *FEED_FORWARD)
    if new:
        config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
        transformer = SD3Transformer2DModel(**(config | {"dual_attention_layers": (0,)}))
        pipe.register_modules(transformer=randomize(transformer, 0))
        layers += SECOND_ATTENTION
    pipe.save_pretrained(folder / "base")
    train(pipe, folder / "lora", layers)
    return folder


def exported(folder: Path, target: Path, form: str, **options: object) -> Proof:
    base = Pretrained(str(folder / "base"))
    return export_lora(base, ExportOptions(folder / "lora", **options), target, form)


def base_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    without = {} if (folder / "text_encoder_3").exists() else WITHOUT_T5
    return StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **without)


def tuned(folder: Path, scale: float) -> Tensor:
    """The velocity to be met, by plain Diffusers and the file of the training."""
    pipe = base_pipeline(folder / "base")
    pipe.load_lora_weights(folder / "lora", adapter_name="tuned")
    pipe.set_adapters(["tuned"], [scale])
    return probe(pipe)


# Names of ComfyUI's SD3: q, k and v of a stream are thirds of one matrix.
FUSED = {
    "attn_to_q": ("x_block.attn.qkv", 0),
    "attn_to_k": ("x_block.attn.qkv", 1),
    "attn_to_v": ("x_block.attn.qkv", 2),
    "attn_add_q_proj": ("context_block.attn.qkv", 0),
    "attn_add_k_proj": ("context_block.attn.qkv", 1),
    "attn_add_v_proj": ("context_block.attn.qkv", 2),
    "attn2_to_q": ("x_block.attn2.qkv", 0),
    "attn2_to_k": ("x_block.attn2.qkv", 1),
    "attn2_to_v": ("x_block.attn2.qkv", 2),
}
WHOLE = {
    "attn_to_out_0": "x_block.attn.proj",
    "attn_to_add_out": "context_block.attn.proj",
    "attn2_to_out_0": "x_block.attn2.proj",
    "ff_net_0_proj": "x_block.mlp.fc1",
    "ff_net_2": "x_block.mlp.fc2",
    "ff_context_net_0_proj": "context_block.mlp.fc1",
    "ff_context_net_2": "context_block.mlp.fc2",
}


def place(key: str, width: int) -> tuple[str, slice]:
    """Where a block's layer lies in ComfyUI's model: a weight's name and its rows."""
    match = re.fullmatch(r"lora_transformer_transformer_blocks_(\d+)_(.+)", key)
    assert match is not None, key
    block = f"joint_blocks.{match[1]}."
    if match[2] in FUSED:
        name, third = FUSED[match[2]]
        return block + name, slice(third * width, (third + 1) * width)
    return block + WHOLE[match[2]], slice(None)


def comfyui_velocity(base: Path, file: Path) -> Tensor:
    """Read a LoRA as ComfyUI does: into its own layout of the base model, which is then turned back."""
    pipe = base_pipeline(base)
    transformer = pipe.transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    linear = {
        "lora_transformer_" + name.replace(".", "_"): module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and re.match(r"transformer_blocks\.\d+\.(attn|ff)", name)
    }
    weights: dict[str, Tensor] = {}
    for key, module in linear.items():
        name, rows = place(key, width)
        if rows == slice(None):
            weights[name] = module.weight.detach().clone()
        else:
            weights.setdefault(name, torch.zeros(3 * width, width))[rows] = module.weight.detach()
    state, used = load_file(file), set()
    for key in linear:
        if f"{key}.lora_up.weight" not in state:
            continue
        used |= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        name, rows = place(key, width)
        weights[name][rows] += state[f"{key}.alpha"].item() / down.shape[0] * (up @ down)
    assert used == set(state)  # ComfyUI only warns of keys that it doesn't know
    for key, module in linear.items():
        name, rows = place(key, width)
        module.weight.data = weights[name][rows].clone()
    return probe(pipe)


def diffusers_velocity(base: Path, file: Path) -> Tensor:
    pipe = base_pipeline(base)
    pipe.load_lora_weights(file)
    return probe(pipe)


READERS = {
    "diffusers": diffusers_velocity,
    "comfyui": comfyui_velocity,
    "merged": lambda base, target: probe(base_pipeline(target)),
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_the_tuned_model_for_its_reader(
    folder: Path, tmp_path: Path, form: str, scale: float
) -> None:
    target = tmp_path / ("merged" if form == "merged" else f"{form}.safetensors")
    proof = exported(folder, target, form, scale=scale)
    wanted, base = tuned(folder, scale), probe(base_pipeline(folder / "base"))
    change = (wanted - base).abs().max()
    assert (READERS[form](folder / "base", target) - wanted).abs().max() < 1e-4 * change
    assert proof.effect == pytest.approx((change / base.abs().max()).item(), rel=1e-3)
    assert proof.effect > 0.1
    assert proof.error < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_merged_pipeline_is_whole(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path / "merged", "merged", dtype=torch.bfloat16)
    files = {str(p.relative_to(folder / "base")) for p in (folder / "base").rglob("*") if p.is_file()}
    assert files == {
        str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*") if p.is_file()
    }
    weights = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not any("lora" in key for key in weights)
    pipe, base = (base_pipeline(f, torch.bfloat16) for f in (tmp_path / "merged", folder / "base"))
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "pt"}
    pictures = [
        made("a red fox", **call, generator=torch.Generator().manual_seed(0)).images for made in (pipe, base)
    ]
    assert (pictures[0] - pictures[1]).abs().mean() > 0.02


def edited(folder: Path, tmp_path: Path, edit) -> Path:
    """A copy of the LoRA with every (key, tensor) changed."""
    file = folder / "lora/pytorch_lora_weights.safetensors"
    state = dict(edit(key, value) for key, value in load_file(file).items())
    with safe_open(file, "pt") as opened:
        save_file(state, tmp_path / "edited.safetensors", metadata=opened.metadata())
    return tmp_path / "edited.safetensors"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda k, v: (k.replace("blocks.1", "blocks.7"), v),
            "no place for key 'transformer.transformer_blocks.7",
        ),
        (
            lambda k, v: (k, torch.cat([v, v], dim=int("lora_A" in k))),
            "load it with the base model it was trained on",
        ),
        (lambda k, v: (k, v * ("lora_A" in k)), "does not change the model's output"),
    ],
    ids=["unknown module", "shape", "no effect"],
)
def test_a_lora_that_is_none_of_this_base_is_refused(
    folder: Path, tmp_path: Path, form: str, edit, message: str
) -> None:
    options = ExportOptions(edited(folder, tmp_path, edit))
    with pytest.raises(ValueError, match=message):
        export_lora(Pretrained(str(folder / "base")), options, tmp_path / "out/x.safetensors", form)
    assert not (tmp_path / "out").exists()


def test_bad_targets_and_scales_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"there.safetensors exists"):
        exported(folder, tmp_path / "there.safetensors", "diffusers")
    with pytest.raises(ValueError, match=r"x.bin must end in .safetensors"):
        exported(folder, tmp_path / "x.bin", "comfyui")
    with pytest.raises(ValueError, match="--scale 0 is the base model"):
        exported(folder, tmp_path / "x.safetensors", "diffusers", scale=0.0)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("form", FORMS)
def test_an_export_that_fails_its_proof_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """What is written is 1 % weaker than the LoRA that was trained."""
    right = export._tuned

    def weaker(base: Pretrained, options: ExportOptions) -> Model:
        model = right(base, options)
        for layer in lora_layers(model.network).values():
            layer.lora_B[ADAPTER].weight.data *= 0.99
        return model

    before = export._outputs(Pretrained(str(folder / "base")), ExportOptions(folder / "lora"))
    monkeypatch.setattr(export, "_outputs", lambda *_: before)
    monkeypatch.setattr(export, "_tuned", weaker)
    with pytest.raises(ValueError, match=f"loaded back, the {form} export differs"):
        exported(folder, tmp_path / "x.safetensors", form)
    assert list(tmp_path.iterdir()) == []


def test_comfyui_is_not_given_what_it_reads_otherwise(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    train(pipe, tmp_path / "lora", ("norm1_context.linear",))
    with pytest.raises(
        ValueError, match=r"ComfyUI may read a LoRA on transformer_blocks.0.norm1_context.linear"
    ):
        exported(tmp_path, tmp_path / "x.safetensors", "comfyui")
    exported(tmp_path, tmp_path / "y.safetensors", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "y.safetensors"]


def test_the_script_says_what_it_proved(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    flags = ["--model", folder / "base", "--lora_path", folder / "lora/pytorch_lora_weights.safetensors"]
    flags += ["--format", "comfyui", "--output", tmp_path / "fox.safetensors"]
    monkeypatch.setattr(sys, "argv", ["export_lora.py", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"comfyui: {tmp_path / 'fox.safetensors'}"
    assert lines[1].startswith("loaded back: the LoRA changes the velocity by ")
    with pytest.raises(SystemExit, match=r"error: .*fox.safetensors exists: remove it"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_is_thin() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 80
