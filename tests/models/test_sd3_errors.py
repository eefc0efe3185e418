"""What a user of SD3 gets wrong: each is one clear error."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.velocity import Conditioning


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no/such/folder.*\nPass a folder"):
        _ = Pretrained(str(tmp_path / "no/such/folder")).family


def test_missing_hub_model_names_page_and_command() -> None:
    with pytest.raises(ValueError, match="cannot load the model") as error:
        Model.from_pretrained(Pretrained("stabilityai/stable-diffusion-3.5-medium", revision="main"))
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium" in str(error.value)
    assert "`hf download stabilityai/stable-diffusion-3.5-medium --revision main`" in str(error.value)


def test_other_pipelines_are_refused(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_sd3_dir / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"holds FluxPipeline, expected a StableDiffusion3Pipeline"):
        _ = Pretrained(str(tmp_path)).family


def test_missing_weights_are_an_error_of_one_screen(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd3_dir, tmp_path / "model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load the model"):
        Model.from_pretrained(Pretrained(str(folder)))


def test_resolution_is_checked_before_and_after_loading(tiny_sd3_dir: Path, model: Model) -> None:
    source = Pretrained(str(tiny_sd3_dir))
    before = partial(source.family.latent_shape, source.config_of)
    assert before(64, 128) == (8, 16, 32)
    assert model.latent_shape(64, 128) == (8, 16, 32)
    for check in (before, model.latent_shape):
        with pytest.raises(ValueError, match=r"height 60 is not a multiple of 8 pixels: use 56 or 64"):
            check(60, 64)
        with pytest.raises(ValueError, match=r"width 0 .* use 8 or 8"):
            check(64, 0)
        with pytest.raises(ValueError, match=r"width 136 is beyond .* use 128 or less"):
            check(64, 136)


@pytest.mark.parametrize("length", [0, 513])
def test_max_sequence_length_is_checked(model: Model, length: int) -> None:
    with pytest.raises(ValueError, match="1 to 512"):
        model.encode_prompts(["a fox"], max_sequence_length=length)


def test_unconditional_call_names_encode_prompts(model: Model) -> None:
    with pytest.raises(ValueError, match="encode_prompts"):
        model.base(torch.zeros(1, 8, 16, 16), torch.ones(1), Conditioning(("a fox",)))
