"""Evaluations of LoRAs of every form, and of files that they must refuse before a model is loaded."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from am_diffusers.models.origin import Origin, TrainedReward, to_bytes
from evaluate_runs import arguments, prepare, run
from evaluating.notes import make_notes
from evaluating.options import parse
from evaluating.plan import make_plan
from evaluating.runs import run_config, targets
from lora_forms import OWN, bad_files, write_forms


@pytest.fixture(scope="module")
def folder(tiny_sd3_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    prepare(tiny_sd3_dir, folder)
    write_forms(tiny_sd3_dir, folder)
    return folder


@pytest.fixture
def ask(folder, tiny_sd3_dir):
    """A function from LoRAs to the plan of their evaluation."""
    return lambda *loras: make_plan(parse(command(tiny_sd3_dir, folder, "out", *loras)))


def command(tiny_sd3_dir, folder, output, *loras):
    return [*arguments(tiny_sd3_dir, folder, output), "--lora_path", *map(str, loras)]


def test_every_form_makes_the_pictures_of_this_programs(folder, tiny_sd3_dir):
    loras = [f"{name}={folder / path}" for name, path in PATHS.items()]
    run(command(tiny_sd3_dir, folder, "whole", *loras), folder / "whole.log")
    pixels = {name: pictures(folder / "whole", name) for name in (*PATHS, "base")}
    assert np.abs(pixels["own"] - pixels["base"]).max() > 10
    for name in PATHS:
        assert np.abs(pixels[name] - pixels["own"]).max() <= 1, name


PATHS = {"own": "own", "peft": "peft", "kohya": "kohya.safetensors", "comfyui": "comfyui.safetensors"}


def pictures(output, name):
    files = sorted(output.glob(f"pictures/{name}-*/*.png"))
    assert files
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def test_bad_files_are_refused_in_the_plan(ask, folder, tmp_path):
    for name, (file, message) in bad_files(folder / "own" / OWN, tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            ask(file)
        assert str(file) in str(error.value), name
        assert "\n" not in str(error.value), name


def test_another_strength_beside_the_weights_is_another_lora(folder, tiny_sd3_dir, tmp_path):
    shutil.copytree(folder / "peft", tmp_path / "lora")
    run(command(tiny_sd3_dir, folder, "changed", tmp_path / "lora"), folder / "changed.log")
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 4}))
    with pytest.raises(AssertionError, match="lora_sha256 was"):
        run(command(tiny_sd3_dir, folder, "changed", tmp_path / "lora"), folder / "changed.log")


def test_a_folder_of_peft_names_its_lora(ask, folder, tmp_path):
    shutil.copytree(folder / "peft", tmp_path / "my run")
    plan = ask(tmp_path / "my run", folder / "own")
    assert [each.name for each in plan.candidates] == ["base", "my-run", "own"]


def test_a_lora_in_the_base_of_a_run_is_told(ask, folder, tmp_path):
    """Such a run's tilt is of another base."""
    shutil.copytree(folder / "own", tmp_path / "run")
    config = {
        "pretrained_model_name_or_path": "tiny_sd3",
        "train_prompts": "t.txt",
        "rewards": [{"name": "pickscore", "weight": 1.0, "mean": 0.0, "std": 1.0}],
        "divergence": "kl",
        "reward_scale": 1.0,
    }
    for as_base in (False, True):
        more = {"init_lora": "other", "init_lora_as_base": as_base}
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | more))
        plan = ask(tmp_path / "run", "--train_prompts", str(folder / "prompts.csv"))
        told = [line for line in make_notes(plan) if "contains the LoRA other" in line]
        assert (len(told), len(targets(plan.candidates))) == ((1, 0) if as_base else (0, 1))


def test_a_lora_tells_by_itself_what_it_contains(ask, folder, tmp_path):
    """Beside the config of another run in the same folder, with another LoRA in its base, or none."""
    shutil.copytree(folder / "own", tmp_path / "run")
    rewards = [TrainedReward("pickscore", 1.0, 0.0, 1.0)]
    common = {"method": "ram", "divergence": "kl", "reward_scale": 1.0, "seed": 0}
    lora = tmp_path / "run" / OWN
    state = load_file(folder / "own" / OWN)
    config = {
        "pretrained_model_name_or_path": "tiny_sd3",
        "train_prompts": "t.txt",
        "rewards": [{"name": "pickscore", "weight": 1.0, "mean": 0.0, "std": 1.0}],
    }
    for fused in ("other", None):
        sha256 = None if fused is None else ["1" * 64]
        origin = Origin(
            base_model="tiny_sd3",
            base_model_sha256="0" * 64,
            rewards=rewards,
            iteration=1,
            init_lora=fused,
            init_lora_sha256=sha256,
            **common,
        )
        lora.write_bytes(to_bytes(state, origin.metadata()))
        for beside in (None, "other", "another"):
            text = {"init_lora": beside, "init_lora_as_base": beside is not None}
            (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | common | text))
            assert ("train_prompts" in run_config(lora)) == (beside == fused)
            plan = ask(tmp_path / "run", "--train_prompts", str(folder / "prompts.csv"))
            told = [line for line in make_notes(plan) if "contains the LoRA other" in line]
            assert (len(told), len(targets(plan.candidates))) == ((0, 1) if fused is None else (1, 0))
