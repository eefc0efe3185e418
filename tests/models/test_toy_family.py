"""A new family is one file (`toy_family.py`) and one line: it trains by the script, chosen by its folder."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from am_diffusers.models import FAMILIES
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from families import PROMPTS, point
from finetune_runs import FINETUNE, read_metrics, tiny_config
from toy_family import TOY


@pytest.fixture
def toy_dir(tiny_sd3_dir: Path, tmp_path: Path) -> Path:
    """The tiny pipeline, which says that it is another."""
    folder = shutil.copytree(tiny_sd3_dir, tmp_path / "toy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    return folder


def finetune(monkeypatch: pytest.MonkeyPatch, config: Path, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--config", str(config), *flags])
    runpy.run_path(str(FINETUNE), run_name="__main__")


def test_a_new_family_trains(toy_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    own = {
        "rewards": [{"name": "brightness"}],
        "eval_prompts": None,
        "eval_rewards": None,
        "max_train_steps": 2,
    }
    guidance = {"rollout_guidance_scale": 2.0, "eval_guidance_scale": 2.0}
    config = tiny_config(toy_dir, tmp_path, **own, **guidance, report_to="none")
    with pytest.raises(
        SystemExit, match="holds ToyPipeline, expected a StableDiffusion3Pipeline: pass the path"
    ):
        finetune(monkeypatch, config)
    monkeypatch.setitem(FAMILIES, "ToyPipeline", TOY)
    finetune(monkeypatch, config, "--dry_run")
    assert "transformer" in capsys.readouterr().out
    finetune(monkeypatch, config)
    assert [line["iteration"] for line in read_metrics(tmp_path / "out")] == [0, 1]
    weights = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert {key.split(".lora_")[0].split("attn.")[1] for key in weights} == {"to_q", "to_v"}
    assert any(value.any() for key, value in weights.items() if ".lora_B." in key)


def test_its_functions_are_those_that_run(toy_dir: Path, tiny_sd3_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "ToyPipeline", TOY)
    toy, sd3 = (Model.from_pretrained(Pretrained(str(folder))) for folder in (toy_dir, tiny_sd3_dir))
    x, sigma, _ = point(sd3)
    cond, other = (
        model.encode_prompts(PROMPTS, max_sequence_length=8, negative_prompt="") for model in (toy, sd3)
    )
    assert other.mask is None
    assert cond.mask is not None
    assert cond.negative().mask.shape == cond.index([0, 1]).mask.shape == (2, 24)
    # Without T5 the masked tokens are zeros anyway.
    assert torch.equal(toy.base(x, sigma, cond), -sd3.base(x, 1 - sigma, other))
    grids = [toy.ode_sigmas(4, (8, side, side)) for side in (8, 16)]
    assert grids[1][2] > grids[0][2] > 0.5
