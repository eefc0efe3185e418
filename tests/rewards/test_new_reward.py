"""A new reward is one file and one line in `REWARDS`: it trains, is estimated, measured and printed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from am_diffusers.rewards import REWARDS
from evaluating.measuring.measures import choose_rewards
from evaluating.tables.tables import column_of, in_order
from finetune_runs import FINETUNE, read_metrics, tiny_config

FILE = '''
"""Redness: how much a convolution with learned weights sees, one number an image."""

from torch import nn

from am_diffusers.rewards.base import DIFFERENTIABLE, Column
from am_diffusers.rewards.learned import LearnedReward
from am_diffusers.rewards.parts.files import find_file, load_strictly, read_weights


class Redness(LearnedReward):
    """Mean of one convolution's output."""

    name = "redness"
    released = "someone/redness/redness.safetensors"
    column = Column("Redness", 1)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, sha256=None, options=DIFFERENTIABLE):
        remedy = "run `hf download someone/redness`"
        network = nn.Conv2d(3, 1, 3)
        load_strictly(network, read_weights(find_file(path, revision, remedy), sha256, remedy), str(path))
        return cls(network, options=options)

    def _pixels(self, images):
        return images

    def _score(self, pixels, prompts):
        return self.network(pixels).float().mean((1, 2, 3))
'''


@pytest.fixture
def config(tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Config of a run on the new reward, whose file is written and whose line is entered."""
    (tmp_path / "redness.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "redness", raising=False)
    monkeypatch.setitem(REWARDS, "redness", __import__("redness").Redness)
    weights = torch.zeros(1, 3, 3, 3)
    weights[0, 0] = 1
    save_file({"weight": weights, "bias": torch.zeros(1)}, tmp_path / "redness.safetensors")
    rewards = [{"name": "redness", "model": str(tmp_path / "redness.safetensors")}]
    changes = {"max_train_steps": 2, "num_inference_steps": 3, "eval_rewards": [{"name": "brightness"}]}
    return tiny_config(tiny_sd3_dir, tmp_path, rewards=rewards, **changes)


def run(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def test_it_trains(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, FINETUNE, "--config", config)
    metrics = read_metrics(config.parent / "out")
    assert [line["iteration"] for line in metrics] == [0, 1]
    assert all(0 < line["reward"] < 9 for line in metrics)
    evaluation = json.loads((config.parent / "out/evaluation.json").read_text())
    assert set(evaluation["rewards"]) == {"redness", "brightness"}


def test_the_rest_reads_the_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, FINETUNE, "--config", config, "--dry_run", "true")
    assert "without weights or a GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="redness needs no conversion: set `model: someone/redness/redness"):
        run(monkeypatch, FINETUNE.parent / "convert_reward.py", "redness", "x.pt", config.parent / "out")
    with pytest.raises(SystemExit):
        run(monkeypatch, FINETUNE.parents[1] / "eval/evaluate.py", "--help")
    assert "world_right, redness; MODEL: folder" in " ".join(capsys.readouterr().out.split())
    model = config.parent / "redness.safetensors"
    assert choose_rewards([f"redness={model}"], {})[0].model == str(model)
    assert in_order(["other", "redness", "pickscore"]) == ["pickscore", "redness", "other"]
    assert column_of("redness") == ("Redness", 1)
