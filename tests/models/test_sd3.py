"""SD3 against the pipeline itself: pictures, prompt embeddings, decoding."""

import gc
import weakref

import pytest
import torch

from am_diffusers.models.base import Model
from am_diffusers.models.sd3 import SD3
from conftest import tiny_pipeline
from families import PROMPTS


def test_noise_levels_are_the_schedulers(model: Model) -> None:
    expected = torch.tensor([1, 0.9004, 0.7511, 0.5030, 0.0089, 0], dtype=torch.float64)
    torch.testing.assert_close(model.ode_sigmas(5, model.latent_shape(64, 64)), expected, atol=1e-4, rtol=0)
    even = torch.linspace(1, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(
        model.sde_sigmas(5, model.latent_shape(64, 64)), 3 * even / (1 + 2 * even), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("t5", [False, True])
@pytest.mark.parametrize("length", [8, 256])
def test_prompt_embeddings_are_the_pipelines(t5: bool, length: int) -> None:
    model = Model(tiny_pipeline(t5=t5), SD3)
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


def test_text_encoders_are_freed_and_known_prompts_stay() -> None:
    model = Model(tiny_pipeline(t5=True), SD3)
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


def test_decode_is_the_pipelines_and_differentiable(model: Model) -> None:
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


def test_decode_is_float32_under_autocast_and_checkpointed_when_asked(model: Model) -> None:
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
