"""Runs that start from a LoRA, as policy or in the base: their start, their resumes, their results."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_runs import make_run

from am_diffusers.config.command_line import parse_config
from am_diffusers.models.base import Model
from am_diffusers.models.lora_files import find_lora, sources_of
from am_diffusers.models.origin import read_origin, weights_sha256
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.run.plan import make_plan
from am_diffusers.run.resume import settings_of
from am_diffusers.system.files import sha256
from am_diffusers.training.checkpoint_folder import CheckpointError
from families import direct, point
from finetune_runs import tiny_config
from lora_forms import FORMS, OWN, bad_files, write_forms

COMMON = {
    "rewards": [{"name": "brightness"}],
    "eval_prompts": None,
    "eval_rewards": None,
    "free_text_encoders": False,
    "certificate_images": 0,
    "num_validation_prompts": 1,
    "validation_steps": 9,
    "max_train_steps": 3,
}


@pytest.fixture(scope="module")
def forms(tiny_sd3_dir, tmp_path_factory):
    return write_forms(tiny_sd3_dir, tmp_path_factory.mktemp("forms"))


def started(tiny_sd3_dir, folder, lora, **changes):
    folder.mkdir(exist_ok=True)
    run = make_run(tiny_sd3_dir, folder, folder, **(COMMON | {"init_lora": str(lora)} | changes))
    (model,) = {each.model for each in fields_of(run)}
    return run, model


def fields_of(run):
    scorer = run.trainer.hooks.validate.scorer
    return scorer.base, scorer.tuned


def velocities(model):
    with torch.no_grad():
        return [field(*point(model)) for field in (model.base, model.policy)]


def reference(tiny_sd3_dir, lora=None):
    """Velocity of the model, with a LoRA file as this program writes it."""
    model = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)))
    if lora is not None:
        model.load_lora(lora)
    return velocities(model)[1]


@pytest.mark.parametrize(("form", "as_base"), [*((form, False) for form in FORMS), ("alphas", True)])
def test_a_run_starts_from_a_lora_of_any_form(tiny_sd3_dir, tmp_path, forms, form, as_base):
    run, model = started(tiny_sd3_dir, tmp_path, forms[form], init_lora_as_base=as_base)
    run.lock.release()
    base, policy = velocities(model)
    tuned = reference(tiny_sd3_dir, forms["own"])
    assert torch.allclose(policy, tuned, atol=1e-5)
    assert torch.allclose(base, tuned if as_base else reference(tiny_sd3_dir), atol=1e-5)


def train(run):
    """Train and leave without results, as a run that is killed after its last checkpoint."""
    run.trainer.train()
    run.lock.release()


def finish(run):
    run.execute()
    return load_file(run.folder / OWN)


def test_a_resume_does_not_load_it_over_what_was_trained(tiny_sd3_dir, tmp_path, forms):
    """The file may even be gone: a checkpoint has all that became of it."""
    whole = finish(started(tiny_sd3_dir, tmp_path / "whole", forms["peft"])[0])
    shutil.copytree(forms["peft"], tmp_path / "lora")
    train(started(tiny_sd3_dir, tmp_path / "parts", tmp_path / "lora", max_train_steps=2)[0])
    shutil.rmtree(tmp_path / "lora")
    run, _ = started(tiny_sd3_dir, tmp_path / "parts", tmp_path / "lora")
    assert run.trainer.state.iteration == 2
    resumed = finish(run)
    assert set(resumed) == set(whole)
    assert all(torch.allclose(resumed[key], whole[key], atol=1e-6) for key in whole)
    fresh = load_file(forms["own"])
    assert max((resumed[key] - fresh[key]).abs().max() for key in whole) > 1e-4


def test_a_lora_in_the_base_is_in_the_result(tiny_sd3_dir, tmp_path, forms):
    run, model = started(tiny_sd3_dir, tmp_path, forms["peft"], init_lora_as_base=True, learning_rate=0.01)
    run.execute()  # loads the file back and compares
    base, policy = velocities(model)
    change, started_by = (policy - base).abs().max(), (base - reference(tiny_sd3_dir)).abs().max()
    assert min(change, started_by) > 1e-3
    pipe = Model.from_pretrained(Pretrained(str(tiny_sd3_dir))).pipeline()
    pipe.load_lora_weights(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(direct(pipe.transformer, *point(model)), policy, atol=1e-5)
    assert "load it alone" in (tmp_path / "out/README.md").read_text()
    origin = read_origin(tmp_path / "out" / OWN)
    assert origin.init_lora == str(forms["peft"])
    assert origin.init_lora_sha256 == [sha256(file) for file in sources_of(find_lora(forms["peft"]))]
    plain = Model.from_pretrained(Pretrained(str(tiny_sd3_dir)), text_and_vae=False)
    assert origin.base_model_sha256 == weights_sha256(plain.network)


def test_a_lora_that_training_started_from_is_not_in_the_base(tiny_sd3_dir, tmp_path, forms):
    finish(started(tiny_sd3_dir, tmp_path, forms["own"], max_train_steps=1)[0])
    origin = read_origin(tmp_path / "out" / OWN)
    assert (origin.init_lora, origin.init_lora_sha256) == (None, None)


def test_the_lora_in_the_base_must_stay_the_same(tiny_sd3_dir, tmp_path, forms):
    shutil.copytree(forms["peft"], tmp_path / "lora")
    more = {"init_lora_as_base": True}
    train(started(tiny_sd3_dir, tmp_path, tmp_path / "lora", max_train_steps=2, **more)[0])
    (tmp_path / "lora").rename(tmp_path / "moved")
    run, _ = started(tiny_sd3_dir, tmp_path, tmp_path / "moved", **more)
    assert run.trainer.state.iteration == 2
    run.lock.release()
    with pytest.raises(CheckpointError, match="init_lora"):
        started(tiny_sd3_dir, tmp_path, forms["own"], **more)


def plan(tiny_sd3_dir, folder, **changes):
    config = tiny_config(tiny_sd3_dir, folder, **(COMMON | changes))
    return make_plan(parse_config(["--config", str(config)]), 1)


@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_files_are_refused_before_a_model_is_loaded(tiny_sd3_dir, tmp_path, forms, dry_run):
    for file, message in bad_files(forms["own"], tmp_path).values():
        with pytest.raises(ValueError, match=message) as error:
            plan(tiny_sd3_dir, tmp_path, init_lora=str(file), dry_run=dry_run)
        assert str(error.value).startswith("--init_lora ")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "has rank 4, this one 2: set --rank 4 or more"),
        ({"lora_layers": ["attn.to_q"]}, "set --lora_layers"),
        ({"init_lora": ""}, "--init_lora is empty"),
        ({"init_lora": None, "init_lora_as_base": True}, "must be false without --init_lora"),
    ],
)
def test_runs_without_room_for_it_are_refused(tiny_sd3_dir, tmp_path, forms, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_sd3_dir, tmp_path, **({"init_lora": str(forms["peft"])} | changes))


def test_the_remedy_works(tiny_sd3_dir, tmp_path, forms):
    changes = {"init_lora": str(forms["peft"]), "lora_layers": ["attn.to_q", "attn.add_q_proj"]}
    with pytest.raises(ValueError, match="set --lora_layers") as error:
        plan(tiny_sd3_dir, tmp_path, **changes)
    config = tiny_config(tiny_sd3_dir, tmp_path, **(COMMON | changes))
    layers = str(error.value).split("--lora_layers '")[1].rstrip("'")
    assert make_plan(parse_config(["--config", str(config), "--lora_layers", layers]), 1)


def test_without_the_flag_old_checkpoints_go_on(tiny_sd3_dir, tmp_path):
    settings = settings_of(plan(tiny_sd3_dir, tmp_path))
    assert not {"init_lora", "init_lora_as_base"} & set(settings)


def test_paths_of_it_are_files(tmp_path, tiny_sd3_dir, forms):
    Path(tmp_path / "outer").mkdir()
    shutil.copytree(forms["peft"], tmp_path / "outer/lora")
    with pytest.raises(ValueError, match=r"there is one in .*outer/lora"):
        plan(tiny_sd3_dir, tmp_path, init_lora=str(tmp_path / "outer"))
