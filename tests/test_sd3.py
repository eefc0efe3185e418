"""SD3 as two velocity fields, against the pipeline itself, autograd and central differences."""

import contextlib
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_diffusers.models import lora
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.sd3 import SD3
from am_diffusers.rollout import sample
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import Conditioning, GuidedField

PROMPTS = ["a red fox", "a blue clock"]


@pytest.fixture
def model(tiny_sd3_dir: Path) -> SD3:
    return SD3.from_pretrained(str(tiny_sd3_dir))


def strong_lora(model: SD3, seed: int = 0) -> SD3:
    """Attach a LoRA that changes the velocity by about its own size."""
    model.attach_lora(rank=4, lora_alpha=8)
    redraw_lora(model, seed)
    return model


def redraw_lora(model: SD3, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.lora_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def point(model: SD3, seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    """Arguments of a field: two latents at different noise levels."""
    x = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0.8, 0.3]), model.encode_prompts(PROMPTS, max_sequence_length=8)


def direct(transformer: torch.nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """The transformer as a Diffusers user calls it."""
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond.embeddings,
        pooled_projections=cond.pooled,
    ).sample


class CountProducts(TorchDispatchMode):
    """Counts matrix products, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


# Equality with the pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ode_sampling_gives_the_pipelines_picture(model: SD3, guidance_scale: float) -> None:
    strong_lora(model)
    noise = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    expected = model.pipeline()(
        PROMPTS,
        negative_prompt=["green", "green"],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        max_sequence_length=8,
        output_type="pt",
    ).images
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8, negative_prompt="green")
    field = GuidedField(model.policy, guidance_scale) if guidance_scale > 1 else model.policy
    images = model.decode(sample(field, ode_euler(model.ode_sigmas(4)), cond, noise))
    assert (images - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().mean() > 0.05


def test_noise_levels_are_the_schedulers(model: SD3) -> None:
    expected = torch.tensor([1, 0.9004, 0.7511, 0.5030, 0.0089, 0], dtype=torch.float64)
    torch.testing.assert_close(model.ode_sigmas(5), expected, atol=1e-4, rtol=0)
    even = torch.linspace(1, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(model.sde_sigmas(5), 3 * even / (1 + 2 * even), atol=1e-6, rtol=0)


@pytest.mark.parametrize("t5", [False, True])
@pytest.mark.parametrize("length", [8, 256])
def test_prompt_embeddings_are_the_pipelines(t5: bool, length: int) -> None:
    model = SD3(tiny_pipeline(t5=t5))
    prompts = ["a red fox", "a blue clock", "a red fox"]
    expected = model.pipeline().encode_prompt(
        prompts, None, None, negative_prompt=["green"] * 3, max_sequence_length=length
    )
    cond = model.encode_prompts(prompts, max_sequence_length=length, negative_prompt="green", batch_size=1)
    ours = (cond.embeddings, cond.negative_embeddings, cond.pooled, cond.negative_pooled)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert cond.prompts == tuple(prompts)
    assert cond.embeddings is not None
    assert cond.embeddings.shape == (3, 16 + length, 64)
    assert bool(cond.embeddings[:, 16:].any()) == t5


def test_each_text_is_encoded_once(model: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode_prompt = model.pipeline().encode_prompt

    def counting(prompt: list[str], **rest: object) -> object:
        seen.extend(prompt)
        return encode_prompt(prompt, **rest)

    monkeypatch.setattr(model.pipeline(), "encode_prompt", counting)
    for _ in range(2):
        model.encode_prompts(["a fox", "a clock", "a fox"], max_sequence_length=8, negative_prompt="")
    assert seen == ["a fox", "a clock", ""]
    model.encode_prompts(["a fox"], max_sequence_length=4)
    assert seen[3:] == ["a fox"]


def test_text_encoders_are_freed_and_known_prompts_stay() -> None:
    model = SD3(tiny_pipeline(t5=True))
    before = model.encode_prompts(PROMPTS, max_sequence_length=8)
    pipe = model.pipeline()
    watched = [weakref.ref(m) for m in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)]
    model.free_text_encoders()
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3
    after = model.encode_prompts(PROMPTS[::-1], max_sequence_length=8)
    assert before.embeddings is not None
    assert after.embeddings is not None
    assert torch.equal(before.embeddings.flip(0), after.embeddings)
    with pytest.raises(ValueError, match=r"'a new one'.*before `free_text_encoders`"):
        model.encode_prompts(["a new one"], max_sequence_length=8)
    pictures = pipe(
        prompt_embeds=before.embeddings,
        pooled_prompt_embeds=before.pooled,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
    ).images
    assert pictures.shape == (2, 3, 64, 64)


# Velocity and vector-Jacobian product


@pytest.mark.parametrize("field", ["policy", "base"])
def test_vjp_is_autograd_through_the_transformer(model: SD3, field: str, tiny_sd3_dir: Path) -> None:
    x, sigma, cond = point(strong_lora(model))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    # The base is held against a transformer that never had a LoRA.
    plain = model if field == "policy" else SD3.from_pretrained(str(tiny_sd3_dir))
    leaf = x.clone().requires_grad_()
    expected = direct(plain.transformer, leaf, sigma, cond)
    (gradient,) = torch.autograd.grad(expected, leaf, cotangent)
    with torch.no_grad():
        velocity, product = getattr(model, field).vjp(x, sigma, cond, cotangent)
    torch.testing.assert_close(velocity, expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(product, gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(getattr(model, field)(x, sigma, cond), expected, atol=1e-6, rtol=1e-6)
    assert not velocity.requires_grad
    assert not product.requires_grad


def test_vjp_matches_central_differences_in_float64(tiny_sd3_dir: Path) -> None:
    model = strong_lora(SD3.from_pretrained(str(tiny_sd3_dir), weight_dtype=torch.float64))
    for parameter in model.lora_parameters():
        parameter.data = parameter.data.double()
    x, sigma, cond = point(model)
    x = x.double()
    generator = torch.Generator().manual_seed(3)
    cotangent, direction = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    for field in (model.policy, model.base):
        _, product = field.vjp(x, sigma, cond, cotangent)
        with torch.no_grad():
            # Fourth order with a wide step: SD3's RMS norm rounds to float32 inside a float64 model.
            step = 1e-2 * direction
            by = {n: (field(x + n * step, sigma, cond) * cotangent).sum() for n in (-2, -1, 1, 2)}
        expected = (8 * (by[1] - by[-1]) - (by[2] - by[-2])) / 12e-2
        torch.testing.assert_close((product * direction).sum(), expected, atol=0, rtol=1e-4)


def test_cotangent_may_depend_on_the_velocity(model: SD3) -> None:
    x, sigma, cond = point(strong_lora(model))
    seen = []

    def cotangent(velocity: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(velocity)
        # A field called in here must neither disturb nor be disturbed by the pass that is under way.
        return 2 * velocity + model.policy(x, sigma, cond)

    velocity, product = model.base.vjp(x, sigma, cond, cotangent)
    with torch.no_grad():
        vector = 2 * velocity + model.policy(x, sigma, cond)
    expected = model.base.vjp(x, sigma, cond, vector)
    assert len(seen) == 1
    torch.testing.assert_close((velocity, product), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[0], velocity, atol=0, rtol=0)


@pytest.mark.parametrize("field", ["policy", "base"])
def test_gradient_checkpointing_changes_no_vjp(model: SD3, field: str) -> None:
    x, sigma, cond = point(strong_lora(model))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    plain = getattr(model, field).vjp(x, sigma, cond, cotangent)
    other = (model.base if field == "policy" else model.policy).vjp(x, sigma, cond, cotangent)
    model.enable_gradient_checkpointing()
    checkpointed = getattr(model, field).vjp(x, sigma, cond, cotangent)
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-6)
    assert (checkpointed[1] - other[1]).abs().max() > 0.1, "the LoRA is too weak for this test to fail"


def test_gradient_checkpointing_changes_no_lora_gradient(model: SD3) -> None:
    x, sigma, cond = point(strong_lora(model))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        velocity = model.policy(x, sigma, cond)
        model.base(x, sigma, cond)  # between forward and backward of the policy
        model.base.vjp(x, sigma, cond, velocity.detach())
        gradients.append(torch.autograd.grad(velocity.square().sum(), model.lora_parameters()))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_base_does_not_depend_on_the_lora(model: SD3) -> None:
    x, sigma, cond = point(model)
    before = model.base(x, sigma, cond)
    assert torch.equal(model.policy(x, sigma, cond), before)
    products = []
    strong_lora(model)
    for seed in (0, 1):
        redraw_lora(model, seed)
        products.append(model.base.vjp(x, sigma, cond, x))
        assert (model.policy(x, sigma, cond) - before).std() > 0.1
    for velocity, product in products:
        assert torch.equal(velocity, before)
        assert torch.equal(product, products[0][1])


def test_vjp_touches_no_lora_weight(model: SD3) -> None:
    x, sigma, cond = point(strong_lora(model))
    products = []
    for trainable in (True, False):
        for parameter in model.lora_parameters():
            parameter.requires_grad_(trainable)
        with CountProducts() as counter:
            model.policy.vjp(x, sigma, cond, x)
        products.append(counter.count)
    assert products[0] == products[1] > 0
    assert all(parameter.grad is None for parameter in model.transformer.parameters())


def test_base_call_records_no_graph(model: SD3) -> None:
    x, sigma, cond = point(strong_lora(model))
    assert not model.base(x.requires_grad_(), sigma, cond).requires_grad
    assert model.policy(x, sigma, cond).requires_grad


def test_adapter_switch_keeps_requires_grad_and_survives_errors(model: SD3) -> None:
    strong_lora(model)
    layers = lora.lora_layers(model.transformer).values()
    frozen, *others = model.lora_parameters()
    frozen.requires_grad_(False)
    with lora.adapters(model.transformer, enabled=False):
        assert all(layer.disable_adapters for layer in layers)
        assert [p.requires_grad for p in (frozen, *others)] == [False] + [True] * len(others)
        with contextlib.suppress(KeyError), lora.adapters(model.transformer, enabled=True):
            assert not any(layer.disable_adapters for layer in layers)
            raise KeyError
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert [p.requires_grad for p in (frozen, *others)] == [False] + [True] * len(others)


def test_training_step_changes_the_lora_alone(model: SD3) -> None:
    x, sigma, cond = point(strong_lora(model))
    frozen = {n: p.clone() for n, p in model.transformer.named_parameters() if ".lora_" not in n}
    base, policy = model.base(x, sigma, cond), model.policy(x, sigma, cond)
    optimizer = torch.optim.AdamW(model.lora_parameters(), lr=1e-2)
    policy.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.lora_parameters())
    # Only the last block's text query has no effect: its text stream ends there.
    dead = [n for n, p in model.transformer.named_parameters() if p.grad is not None and not p.grad.any()]
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in dead)
    optimizer.step()
    assert model.policy(x, sigma, cond).square().mean() < policy.square().mean()
    assert torch.equal(model.base(x, sigma, cond), base)
    for name, parameter in model.transformer.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def test_distributed_wrapper_is_used_for_training_only(model: SD3, tmp_path: Path) -> None:
    x, sigma, cond = point(strong_lora(model))
    expected = torch.autograd.grad(model.policy(x, sigma, cond).square().sum(), model.lora_parameters())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model.prepare(torch.nn.parallel.DistributedDataParallel)
        calls = []
        model.trainable.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(2):  # the second backward meets parameters that were switched in between
            model.transformer.zero_grad()
            loss = model.policy(x, sigma, cond).square().sum()
            with torch.no_grad():
                model.policy(x, sigma, cond)
            model.base(x, sigma, cond)
            model.base.vjp(x, sigma, cond, x)
            model.policy.vjp(x, sigma, cond, x)
            loss.backward()
            gradients = tuple(p.grad for p in model.lora_parameters())
            torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)
        assert len(calls) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_bfloat16_weights_with_a_float32_lora(model: SD3, tiny_sd3_dir: Path, checkpointed: bool) -> None:
    half = strong_lora(SD3.from_pretrained(str(tiny_sd3_dir), weight_dtype=torch.bfloat16))
    if checkpointed:
        half.enable_gradient_checkpointing()
    assert half.transformer.proj_out.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in half.lora_parameters()} == {torch.float32}
    x, sigma, cond = point(strong_lora(model))
    half_cond = half.encode_prompts(PROMPTS, max_sequence_length=8)
    for name in ("policy", "base"):
        exact = getattr(model, name).vjp(x, sigma, cond, x)
        rough = getattr(half, name).vjp(x, sigma, half_cond, x)
        for got, want in zip(rough, exact, strict=True):
            assert got.dtype == torch.float32
            assert (got - want).norm() < 0.05 * want.norm()
    half.policy(x, sigma, half_cond).square().sum().backward()
    model.policy(x, sigma, cond).square().sum().backward()
    for got, want in zip(half.lora_parameters(), model.lora_parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad - want.grad).norm() <= 0.1 * want.grad.norm()


# Decoding


def test_decode_is_the_pipelines_and_differentiable(model: SD3) -> None:
    latents = torch.randn(2, *model.latent_shape(64, 32), generator=torch.Generator().manual_seed(0)) / 2
    pipe, config = model.pipeline(), model.vae.config
    with torch.no_grad():
        raw = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    images = model.decode(latents.requires_grad_())
    torch.testing.assert_close(images.detach(), pipe.image_processor.postprocess(raw, output_type="pt"))
    assert images.shape == (2, 3, 64, 32)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((images * weights).sum(), latents)
    model.vae.double()
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        up, down = (model.decode(latents.double() + s * direction) for s in (1e-5, -1e-5))
    expected = ((up - down) / 2e-5 * weights).sum()
    torch.testing.assert_close((gradient * direction).sum(), expected, atol=1e-3, rtol=1e-3)


def test_decode_is_float32_under_autocast_and_checkpointed_when_asked(model: SD3) -> None:
    latents = torch.randn(1, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    passes = []
    model.vae.decoder.mid_block.register_forward_pre_hook(lambda *_: passes.append(1))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16):
            images = model.decode(latents)
        results.append((images, *torch.autograd.grad(images.square().sum(), latents)))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1])
    assert len(passes) == 3, "one forward without checkpointing, two with"


# What a user gets wrong


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no/such/folder.*\nPass a folder"):
        Pretrained(str(tmp_path / "no/such/folder")).check()


def test_missing_hub_model_names_page_and_command() -> None:
    with pytest.raises(ValueError, match="cannot load the model") as error:
        SD3.from_pretrained("stabilityai/stable-diffusion-3.5-medium", revision="main")
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium" in str(error.value)
    assert "`hf download stabilityai/stable-diffusion-3.5-medium --revision main`" in str(error.value)


def test_other_pipelines_are_refused(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_sd3_dir / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"holds FluxPipeline, expected a StableDiffusion3Pipeline"):
        Pretrained(str(tmp_path)).check()


def test_missing_weights_are_an_error_of_one_screen(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd3_dir, tmp_path / "model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load the model"):
        SD3.from_pretrained(str(folder))


def test_float16_is_refused(tiny_sd3_dir: Path) -> None:
    with pytest.raises(ValueError, match="use bfloat16"):
        SD3.from_pretrained(str(tiny_sd3_dir), weight_dtype=torch.float16)


def test_resolution_is_checked_before_and_after_loading(tiny_sd3_dir: Path, model: SD3) -> None:
    source = Pretrained(str(tiny_sd3_dir))
    source.check(64, 128)
    assert model.latent_shape(64, 128) == (8, 16, 32)
    for check in (source.check, model.latent_shape):
        with pytest.raises(ValueError, match=r"height 60 is not a multiple of 8 pixels: use 56 or 64"):
            check(60, 64)
        with pytest.raises(ValueError, match=r"width 0 .* use 8 or 8"):
            check(64, 0)
        with pytest.raises(ValueError, match=r"width 136 is beyond .* use 128 or less"):
            check(64, 136)


@pytest.mark.parametrize("length", [0, 513])
def test_max_sequence_length_is_checked(model: SD3, length: int) -> None:
    with pytest.raises(ValueError, match="1 to 512"):
        model.encode_prompts(["a fox"], max_sequence_length=length)


def test_unconditional_call_names_encode_prompts(model: SD3) -> None:
    with pytest.raises(ValueError, match="encode_prompts"):
        model.base(torch.zeros(1, 8, 16, 16), torch.ones(1), Conditioning(("a fox",)))
