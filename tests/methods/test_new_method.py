"""A method is added by one file, one line in METHODS and one YAML: nothing else knows it."""

import importlib.util
import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from finetune_runs import FINETUNE, read_metrics, tiny_config

FILE = '''
"""Drift: velocities of the base, moved by a constant; a method that nobody needs."""

from dataclasses import dataclass

from am_diffusers.methods.parts.advantages import reward_values
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.ranges import require


@dataclass(frozen=True)
class DriftSettings:
    """`method: drift`.

    Attributes:
        drift_length: how far each number of a velocity is moved.
    """

    drift_length: float = 0.5

    def __post_init__(self):
        require(self, [(self.drift_length > 0, "drift_length", "positive")])


class Drift(MatchingMethod[None]):
    """A regression on the base's velocity at noise, moved."""

    title, paper = "Drift", "2401.00001"
    Settings = DriftSettings
    needs_reward_gradient = False

    @classmethod
    def law(cls, shared, own):
        return f" towards the base moved by {own.drift_length:g}"

    def prepare(self, cond, generators, shared):
        pass

    def chunk(self, common, ids, cond, generators):
        x = self.latents.draw(generators)
        sigma = x.new_full((len(x),), 0.5)
        target = self.base(x, sigma, cond) + self.own.drift_length
        rewards = reward_values(self.around.reward, x, cond.prompts, batch_size=self.sizes.reward)
        ones = sigma[:, None].new_ones((len(x), 1))
        return Chunk(Rows(x[:, None], target[:, None], sigma[:, None], ones, ones), {"reward": rewards})
'''


@pytest.fixture
def drift(tmp_path, monkeypatch):
    """The method's class, from a file of its own and with its line in METHODS."""
    path = tmp_path / "drift.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("drift", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "drift", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "drift", module.Drift)
    return module.Drift


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    """Flags of a run of two iterations of the embedded model, and the method's own YAML."""
    common = {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None}
    sizes = {"max_train_steps": 2, "train_batch_size": 2, "num_validation_prompts": 1, "report_to": "none"}
    run = tiny_config("asset:tiny_sd3", tmp_path, **common, **sizes, num_inference_steps=20)
    own = tmp_path / "drift.yaml"
    own.write_text("# configs/methods/drift.yaml\nmethod: drift\ndrift_length: 0.25\n")
    return ["--config", str(run), "--config", str(own)]


def test_a_new_method_trains_by_the_script(drift, configs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(FINETUNE), *configs])
    runpy.run_path(str(FINETUNE), run_name="__main__")
    output = tmp_path / "out"
    lines = read_metrics(output)
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["grad_norm"] > 0 and "reward" in line for line in lines)
    lora = load_file(output / "pytorch_lora_weights.safetensors")
    assert max(value.abs().max() for key, value in lora.items() if "lora_B" in key) > 0
    stored = yaml.safe_load((output / "config.yaml").read_text())
    assert (stored["method"], stored["drift_length"]) == ("drift", 0.25)
    card = (output / "README.md").read_text()
    assert "fine-tuned by Drift ([arXiv 2401.00001](https://arxiv.org/abs/2401.00001))" in card
    assert "2 iterations of 2 images towards the base moved by 0.25." in card


def test_its_flag_is_in_the_help_and_its_range_is_checked(drift, configs, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--drift_length DRIFT_LENGTH how far each number of a velocity is moved." in shown
    with pytest.raises(ValueError, match=r"--drift_length must be positive, got 0\.0"):
        parse_config([*configs, "--drift_length", "0"])


def test_other_methods_refuse_its_flag_and_it_refuses_theirs(drift, configs):
    assert parse_config(configs).settings == drift.Settings(0.25)
    for name in set(METHODS) - {"drift"}:
        with pytest.raises(ValueError, match=f"--drift_length is for drift, not for {name}: leave it out"):
            parse_config([*configs, "--method", name])
    for flag, value in [("draft_steps", "2"), ("pairing", "left"), ("mask_quantile", "0.5")]:
        with pytest.raises(ValueError, match=f"--{flag} is for .*, not for drift: leave it out"):
            parse_config([*configs, f"--{flag}", value])
