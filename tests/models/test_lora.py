"""The LoRA: attached as the identity, exported at the right strength for Diffusers, checked on loading."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from am_diffusers.models.adapters import lora_layers
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.proof import prompt_point, verify_lora
from am_diffusers.models.sd3 import SD3


def trained(model: Model, rank: int = 4, lora_alpha: int = 8) -> Model:
    """Attach a LoRA whose weights are as after a training that changed the pictures a lot."""
    model.attach_lora(rank=rank, lora_alpha=lora_alpha)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.lora_parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def plain_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The base model as a Diffusers user loads it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusion3Pipeline, scale: float | None = None) -> Tensor:
    return pipe(
        "a red fox",
        latents=torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(7)),
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=8,
        output_type="pt",
        joint_attention_kwargs=None if scale is None else {"scale": scale},
    ).images


def rewrite(file: Path, state: dict[str, Tensor], *, keep_metadata: bool = True) -> Path:
    with safe_open(file, "pt") as old:
        metadata = old.metadata() if keep_metadata else {"format": "pt"}
    save_file(state, file, metadata=metadata)
    return file


def test_lora_covers_the_eight_projections_of_every_block(model: Model) -> None:
    model.attach_lora(rank=4)
    blocks = [f"transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in SD3.lora_layers]
    blocks.remove("transformer_blocks.1.attn.to_add_out")  # the text stream ends before it
    layers = lora_layers(model.network)
    assert sorted(layers) == sorted(blocks)
    assert {layer.scaling["default"] for layer in layers.values()} == {64 / 4}
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in model.lora_parameters().values()}


def test_lora_starts_as_the_identity_from_its_seed(tiny_sd3_dir: Path) -> None:
    weights, states = [], []
    for seed in (1, 1, 2):
        model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
        before = torch.get_rng_state()
        model.attach_lora(rank=4, seed=seed)
        states.append(torch.equal(before, torch.get_rng_state()))
        weights.append(torch.cat([p.detach().flatten() for p in model.lora_parameters().values()]))
        x, sigma = torch.randn(1, 8, 16, 16), torch.tensor([0.5])
        cond = model.encode_prompts(["a fox"], max_sequence_length=8)
        assert torch.equal(model.policy(x, sigma, cond), model.base(x, sigma, cond))
        torch.rand(1)  # the global generator must not matter
    assert all(states)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].any()


def test_attaching_refuses_unknown_layers_and_a_second_lora(model: Model) -> None:
    with pytest.raises(ValueError, match=r"no linear layer ends in 'attn.to_x'"):
        model.attach_lora(layers=("attn.to_q", "attn.to_x"))
    model.attach_lora(layers=("attn.to_q",))
    assert len(lora_layers(model.network)) == 2
    with pytest.raises(ValueError, match="has a LoRA already"):
        model.attach_lora()
    with pytest.raises(ValueError, match="has a LoRA already"):
        model.load_lora("anywhere")


def test_export_metadata_says_alpha_is_rank(model: Model, tmp_path: Path) -> None:
    file = trained(model, 4, 8).save_lora(tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        keys = list(opened.keys())
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 4
    assert all(key.startswith("transformer.") and not key.endswith("alpha") for key in keys)


def test_scale_zero_is_the_base_and_fusing_changes_nothing(
    model: Model, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    trained(model).save_lora(tmp_path)
    pipe = plain_pipeline(tiny_sd3_dir)
    base = picture(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="tuned")
    tuned = picture(pipe)
    assert torch.equal(picture(pipe, scale=0.0), base)
    pipe.set_adapters(["tuned"], [0.0])
    assert torch.equal(picture(pipe), base)
    pipe.set_adapters(["tuned"], [1.0])
    pipe.fuse_lora()
    assert (picture(pipe) - tuned).abs().max() < 1e-4
    pipe.unfuse_lora()
    assert (picture(pipe) - tuned).abs().max() < 1e-4
    pipe.unload_lora_weights()
    assert (picture(pipe) - base).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_load_lora_applies_its_scale(model: Model, tiny_sd3_dir: Path, tmp_path: Path, scale: float) -> None:
    file = trained(model).save_lora(tmp_path)
    pipe = plain_pipeline(tiny_sd3_dir)
    pipe.load_lora_weights(tmp_path, adapter_name="tuned")
    pipe.set_adapters(["tuned"], [scale])
    other = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    other.load_lora(file if scale else tmp_path, scale=scale)
    assert (picture(other.pipeline()) - picture(pipe)).abs().max() < 1e-6
    assert {p.dtype for p in other.lora_parameters().values()} == {torch.float32}
    x, sigma = torch.randn(1, 8, 16, 16), torch.tensor([0.5])
    cond = other.encode_prompts(["a fox"], max_sequence_length=8)
    assert torch.equal(
        other.base(x, sigma, cond), Model.from_pretrained(Pretrained(str(tiny_sd3_dir))).base(x, sigma, cond)
    )


def test_a_loaded_lora_saves_at_the_strength_it_has(model: Model, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """A file of another trainer: ranks and alphas differ by layer, nothing is folded."""
    file = trained(model).save_lora(tmp_path / "first")
    layer = "transformer_blocks.0.attn.to_q"
    state, a, b = load_file(file), *(f"transformer.{layer}.lora_{part}.weight" for part in "AB")
    state |= {a: state[a][:2].contiguous(), b: state[b][:, :2].contiguous()}
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    patterns = {"rank_pattern": {layer: 2}, "alpha_pattern": {layer: 6, layer.replace("0", "1"): 12}}
    metadata |= {"transformer.lora_alpha": 8} | {f"transformer.{k}": v for k, v in patterns.items()}
    save_file(state, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    other = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    other.load_lora(file, scale=0.5)
    scalings = {layer.scaling["default"] for layer in lora_layers(other.network).values()}
    assert scalings == {1.0, 1.5}
    expected = picture(other.pipeline())
    other.save_lora(tmp_path / "second")
    pipe = plain_pipeline(tiny_sd3_dir)
    pipe.load_lora_weights(tmp_path / "second")
    assert (picture(pipe) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda k: k.replace("transformer.", "base_model.model.", 1), "adapter_config.json is missing"),
        (lambda k: k.replace("blocks.1", "blocks.7"), "no place for key 'transformer.transformer_blocks.7"),
        (lambda k: k.replace("transformer.", "text_encoder.", 1), "changes a text encoder too"),
        (lambda k: k.replace("lora_A", "lora_C"), "no place for key .*lora_C"),
        (lambda k: None if "0.attn.to_q.lora_B" in k else k, "lacks lora_A or lora_B"),
    ],
)
def test_files_that_would_load_without_effect_are_refused(
    model: Model, tmp_path: Path, edit, message
) -> None:
    file = trained(model).save_lora(tmp_path)
    state = {edit(key): value for key, value in load_file(file).items()}
    state.pop(None, None)
    rewrite(file, state)
    fresh = Model.from_pretrained(Pretrained(model.pipeline().config._name_or_path))
    with pytest.raises(ValueError, match=message):
        fresh.load_lora(tmp_path)
    assert not lora_layers(fresh.network)


def test_a_lora_of_another_base_model_is_refused(model: Model, tmp_path: Path) -> None:
    file = trained(model).save_lora(tmp_path)
    wide = {k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in load_file(file).items()}
    rewrite(file, wide)
    fresh = Model.from_pretrained(Pretrained(model.pipeline().config._name_or_path))
    with pytest.raises(ValueError, match=r"64 x 64, this base model has 32 x 32: load it with"):
        fresh.load_lora(file)


def test_unreadable_files_are_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no LoRA file .*pytorch_lora_weights.safetensors"):
        model.load_lora(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no LoRA file .*pass a .safetensors file"):
        model.load_lora(tmp_path / "lora.bin")
    (tmp_path / "lora.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the LoRA file .*lora.safetensors"):
        model.load_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_verify_accepts_a_good_export(tiny_sd3_dir: Path, tmp_path: Path, weight_dtype: torch.dtype) -> None:
    model = trained(Model.from_pretrained(Pretrained(str(tiny_sd3_dir)), weight_dtype=weight_dtype))
    cond = model.encode_prompts(["a fox"], max_sequence_length=8)
    model.free_text_encoders()
    result = verify_lora(model, model.save_lora(tmp_path), prompt_point(model, cond, 64, 64))
    assert result.effect > 0.1
    assert result.error * result.effect < (1e-5 if weight_dtype == torch.float32 else 0.05)


def test_verify_refuses_an_export_without_effect(model: Model, tmp_path: Path) -> None:
    model.attach_lora(rank=4)
    cond = model.encode_prompts(["a fox"], max_sequence_length=8)
    with pytest.raises(ValueError, match="does not change the model"):
        verify_lora(model, model.save_lora(tmp_path), prompt_point(model, cond, 64, 64))


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", [{"lora_B": 0.5}, {"lora_B": 1.1}, {"1.attn.to_q": None}])
def test_verify_refuses_an_export_of_another_effect(
    tiny_sd3_dir: Path, tmp_path: Path, weight_dtype: torch.dtype, edit: dict[str, float | None]
) -> None:
    model = trained(Model.from_pretrained(Pretrained(str(tiny_sd3_dir)), weight_dtype=weight_dtype))
    for parameter in model.lora_parameters().values():  # weak: in bfloat16 its effect drowns in rounding
        parameter.data *= 0.1
    cond = model.encode_prompts(["a fox"], max_sequence_length=8)
    file = model.save_lora(tmp_path)
    ((part, factor),) = edit.items()
    state = load_file(file)
    for key in [key for key in state if part in key]:
        value = state.pop(key)
        state |= {} if factor is None else {key: value * factor}
    rewrite(file, state)
    with pytest.raises(ValueError, match="reloaded, it differs from the trained model"):
        verify_lora(model, file, prompt_point(model, cond, 64, 64))


def test_verify_refuses_a_base_model_that_changed(model: Model, tmp_path: Path) -> None:
    trained(model).network.proj_out.weight.data += 0.01
    cond = model.encode_prompts(["a fox"], max_sequence_length=8)
    with pytest.raises(ValueError, match=r"weights by 0.0e\+00, velocity by"):
        verify_lora(model, model.save_lora(tmp_path), prompt_point(model, cond, 64, 64))


def test_verify_needs_to_know_the_base_model(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    model = trained(Model(plain_pipeline(tiny_sd3_dir), SD3))
    cond = model.encode_prompts(["a fox"], max_sequence_length=8)
    with pytest.raises(ValueError, match="from_pretrained"):
        verify_lora(model, model.save_lora(tmp_path), prompt_point(model, cond, 64, 64))
