"""The released SD3 transformer configurations, with random weights and two layers, under Adjoint Matching."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from am_diffusers.models.adapters import lora_layers
from am_diffusers.models.base import Model
from am_diffusers.models.sd3 import SD3
from am_diffusers.noise import LatentSpec, generator_for, generators_for
from conftest import tiny_t5, tiny_text_encoder, tiny_tokenizer, tiny_vae
from methods_around import adjoint_matching

# config.json of stabilityai/stable-diffusion-3-medium and -3.5-medium, which have 24 layers.
RELEASED = {
    "sd3-medium": {"pos_embed_max_size": 192, "qk_norm": None, "dual_attention_layers": ()},
    "sd3.5-medium": {
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
}


@pytest.fixture(scope="module", params=RELEASED)
def transformer(request: pytest.FixtureRequest) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        **RELEASED[request.param],
    )


def released_model(transformer: SD3Transformer2DModel, *, t5: bool) -> Model:
    """The transformer with text encoders of the released widths (two layers) and a small VAE."""
    if lora_layers(transformer):
        transformer.unload_lora()
    text_encoder_3, tokenizer_3 = tiny_t5(4096) if t5 else (None, None)
    return Model(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(latent_channels=16),
            text_encoder=tiny_text_encoder(1, width=768, tokens=77),
            tokenizer=tiny_tokenizer(77),
            text_encoder_2=tiny_text_encoder(2, width=1280, tokens=77),
            tokenizer_2=tiny_tokenizer(77),
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        ),
        SD3,
    )


@pytest.mark.parametrize("t5", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_iterations_of_adjoint_matching(transformer: SD3Transformer2DModel, t5: bool) -> None:
    model = released_model(transformer, t5=t5)
    cond = model.encode_prompts(["a red fox on a blue background"])
    model.free_text_encoders()
    assert cond.embeddings is not None
    assert cond.embeddings.shape == (1, 77 + 256, 4096)
    assert bool(cond.embeddings[:, 77:].any()) == t5
    model.attach_lora(rank=4, lora_alpha=8)
    model.enable_gradient_checkpointing()

    def brightness(latents: Tensor, prompts: object) -> Tensor:
        return model.decode(latents).mean(dim=(1, 2, 3))

    method = adjoint_matching(
        model.policy,
        model.base,
        reward=brightness,
        latents=LatentSpec(model.latent_shape(64, 64)),
        sigmas=lambda steps: model.sde_sigmas(steps, model.latent_shape(64, 64)),
        num_inference_steps=2,
        reward_scale=100.0,
        mask_quantile=None,
    )
    x, sigma = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        before = [field(x, sigma, cond) for field in (model.policy, model.base)]
    assert before[0].std() > 0.1
    optimizer = torch.optim.AdamW(model.lora_parameters().values(), lr=1e-2)
    for iteration in range(2):
        collected = method.collect(cond, generators_for(0, iteration, [0]), generator_for(0, iteration))
        loss, _ = method.loss(collected.examples)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.lora_parameters().values()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert sum(g.abs().sum().item() for g in gradients if g is not None) > 0
        optimizer.step()
    with torch.no_grad():
        policy, base = model.policy(x, sigma, cond), model.base(x, sigma, cond)
    assert torch.equal(base, before[1])
    assert (policy - before[0]).abs().max() > 1e-3
    assert policy.isfinite().all()


def test_lora_on_the_second_attention_is_a_choice(transformer: SD3Transformer2DModel) -> None:
    model = released_model(transformer, t5=False)
    model.attach_lora(rank=2)
    assert not any(".attn2." in name for name in lora_layers(transformer))
    transformer.unload_lora()
    if transformer.config["dual_attention_layers"]:
        model.attach_lora(rank=2, layers=("attn2.to_q",))
        assert len(lora_layers(transformer)) == 2
    else:
        with pytest.raises(ValueError, match=r"no linear layer ends in 'attn2.to_q'"):
            model.attach_lora(rank=2, layers=("attn2.to_q",))
