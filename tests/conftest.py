"""Fixtures shared by the tests: a random-weight Stable Diffusion 3 pipeline small enough for any CPU."""

import os
import socket
import string
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tensors of tests are tiny: threads only wait for each other, for minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from cards import pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_collection_modifyitems", "pytest_configure"]  # pytest calls them

WORDS = ("fox", "red", "blue", "background", "clock")


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every weight anew: layers that start at zero would hide mistakes from the tests."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        offset = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer with single characters and the merges that spell WORDS."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *characters, *(c + "</w>" for c in characters)]
    merges = []
    for word in WORDS:
        left = word[0]
        for i, right in enumerate(word[1:], start=2):
            merges.append((left, right + "</w>" * (i == len(word))))
            left = "".join(merges[-1])
            tokens.append(left)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=length)


def tiny_text_encoder(seed: int, width: int = 32, tokens: int = 16) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text tower."""
    config = CLIPTextConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=64,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return randomize(CLIPTextModelWithProjection(config), seed)


def tiny_t5(width: int, seed: int = 4) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A one-layer T5 encoder of `width` channels and its tokenizer."""
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((c, -3.0) for c in "▁" + string.ascii_lowercase),
    ]
    config = T5Config(vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return randomize(T5EncoderModel(config), seed), T5TokenizerFast(vocab=vocab, extra_ids=0)


def tiny_vae(latent_channels: int = 8) -> AutoencoderKL:
    """A VAE of 4 pixels per latent position."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomize(vae, 3)


def tiny_pipeline(*, t5: bool = False) -> StableDiffusion3Pipeline:
    """A pipeline of the real classes with random weights: 64 x 64 pixels."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    text_encoder_3, tokenizer_3 = tiny_t5(64) if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(1),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_text_encoder(2),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


@pytest.fixture(scope="session")
def tiny_sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tiny_pipeline`, as `StableDiffusion3Pipeline.from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("models") / "tiny_sd3"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_sd3_dir: Path) -> Model:
    """The pipeline as the package loads it, freshly for each test."""
    return Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))


@pytest.fixture(scope="session")
def small_rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random reward models in folders of their names; tests that change one copy it."""
    from reward_models import SAVE

    folder = tmp_path_factory.mktemp("rewards")
    for name, save in SAVE.items():
        save(folder / name)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE as if set at start, and any attempt to connect an error of its own."""

    def refuse(*_: object) -> None:
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
