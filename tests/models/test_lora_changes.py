"""LoRAs changed for one another and in strength, against freshly loaded models, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.proof import lora_effect, prompt_point
from families import point, redraw_lora


def saved(folder: Path, base: Path, seed: int, rank: int, lora_alpha: int, layers: tuple[str, ...]) -> Path:
    model = Model.from_pretrained(Pretrained(str(base)))
    model.attach_lora(rank=rank, lora_alpha=lora_alpha, layers=layers)
    redraw_lora(model, seed)
    return model.save_lora(folder / str(seed))


@pytest.fixture
def files(tiny_sd3_dir: Path, tmp_path: Path) -> list[Path]:
    """Two strong LoRAs of different rank, strength and layers."""
    first = saved(tmp_path, tiny_sd3_dir, 0, 4, 8, ("attn.to_q", "attn.to_v", "attn.to_out.0"))
    return [first, saved(tmp_path, tiny_sd3_dir, 1, 2, 1, ("attn.to_k", "attn.add_q_proj", "attn.to_v"))]


def policy(model: Model) -> Tensor:
    with torch.no_grad():
        return model.policy(*point(model))


def test_loras_in_turn_are_as_in_fresh_models(model: Model, tiny_sd3_dir: Path, files: list[Path]) -> None:
    base, names = policy(model), list(model.network.state_dict())
    for file in [*files, files[0]]:
        model.load_lora(file)
        for scale in (0.5, 2.0, 1.0):
            model.set_lora_scale(scale)
            fresh = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
            fresh.load_lora(file, scale=scale)
            assert torch.equal(policy(model), policy(fresh))
            with torch.no_grad():
                assert torch.equal(model.base(*point(model)), base)
        assert (policy(model) - base).abs().max() > 0.1 * base.abs().max()
        model.unload_lora()
        assert torch.equal(policy(model), base)
        assert list(model.network.state_dict()) == names
        assert not model.lora_parameters()
        assert not any(p.requires_grad for p in model.network.parameters())


def test_scale_zero_is_the_base_and_scales_differ(model: Model, files: list[Path]) -> None:
    base = policy(model)
    model.load_lora(files[0])
    seen = [policy(model)]
    for scale in (0.5, 2.0):
        model.set_lora_scale(scale)
        seen.append(policy(model))
    model.set_lora_scale(0)
    assert torch.equal(policy(model), base)
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_the_effect_is_that_of_a_plain_comparison(model: Model, files: list[Path]) -> None:
    cond = model.encode_prompts(["a red fox", "a blue clock"], max_sequence_length=8)
    assert lora_effect(model, prompt_point(model, cond, 64, 64)) == 0
    model.load_lora(files[0])
    effect = lora_effect(model, prompt_point(model, cond, 64, 64))
    assert 0.1 < effect < 10
    x = torch.randn(1, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tuned, base = (field(x, torch.tensor([0.5]), cond.index([0])) for field in (model.policy, model.base))
    assert effect == ((tuned - base).abs().max() / base.abs().max()).item()
    model.set_lora_scale(0)
    assert lora_effect(model, prompt_point(model, cond, 64, 64)) == 0
    model.unload_lora()
    model.attach_lora(rank=2)
    assert lora_effect(model, prompt_point(model, cond, 64, 64)) == 0, "one that was not trained"


def test_what_cannot_be_changed(model: Model, files: list[Path]) -> None:
    for change in (model.unload_lora, lambda: model.set_lora_scale(1.0)):
        with pytest.raises(ValueError, match="no LoRA: load one first"):
            change()
    model.load_lora(files[0])
    with pytest.raises(ValueError, match="finite scale of the LoRA, got nan"):
        model.set_lora_scale(float("nan"))
    with pytest.raises(ValueError, match="has a LoRA already: unload it"):
        model.load_lora(files[1])
