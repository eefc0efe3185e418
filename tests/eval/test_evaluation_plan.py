"""What `eval/evaluate.py` refuses, before any weights are read where it can."""

import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from am_diffusers.models.base import Model
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.models.origin import Origin, TrainedReward, to_bytes
from am_diffusers.rewards import RewardScale
from am_diffusers.system.processes import Processes
from evaluate_runs import write_lora
from evaluating.driver import evaluate
from evaluating.notes import make_notes
from evaluating.options import parse
from evaluating.plan import lora_file, make_plan
from evaluating.runs import run_config, targets
from evaluating.store import Store
from evaluating.summary.tilt import Target
from reward_models import save_pickscore

TINY = "asset:tiny_sd3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_sd3_dir):
    folder = tmp_path_factory.mktemp("plan")
    save_pickscore(folder / "pickscore")
    (folder / "prompts.txt").write_text("a red fox\na blue clock\n")
    for seed, name in enumerate(("first", "second")):
        write_lora(tiny_sd3_dir, folder / name, seed=seed)
    nothing = {
        key: value * ("lora_A" in key) for key, value in load_file(folder / "first" / LORA_FILE).items()
    }
    (folder / "nothing").mkdir()
    save_file(nothing, folder / "nothing" / LORA_FILE)
    (folder / "broken").mkdir()
    (folder / "broken" / LORA_FILE).write_bytes(b"no tensors")
    return folder


@pytest.fixture
def ask(folder, tiny_sd3_dir):
    """A plan from the least that is needed, with some flags changed."""

    def ask(**changes):
        given = {
            "pretrained_model_name_or_path": tiny_sd3_dir,
            "prompts": folder / "prompts.txt",
            "rewards": f"pickscore={folder / 'pickscore'}",
            "output_dir": folder / "out",
            "resolution": 64,
            "max_sequence_length": 8,
            "num_inference_steps": 2,
            "num_images_per_prompt": 1,
        } | changes
        argv = []
        for flag, value in given.items():
            argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return make_plan(parse(argv))

    return ask


def do(plan):
    return list(evaluate(plan, Processes(Accelerator())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sequence_length": 600}, r"max_sequence_length is 600, expected 1 to 512"),
        (
            {"num_inference_steps": [2, 1], "sampler": "memoryless_euler"},
            "steps of the sampler memoryless_euler: expected at least 2, got 1",
        ),
        ({"prompts": "nowhere.txt"}, r"nowhere\.txt: no such file"),
        ({"prompts": "DrawBenc"}, "DrawBench"),
        ({"prompts_column": "text", "prompts": "CSV"}, "no column 'text'; it has 'prompt'"),
        ({"prompts": "EMPTY"}, "no prompt in it"),
        ({"rewards": "pickscor"}, "did you mean 'pickscore'"),
        ({"rewards": "pickscore=nowhere/at/all/x"}, "no such file or folder"),
        ({"rewards": ["brightness", "brightness"]}, "give each name once"),
        ({"features": "dino"}, "did you mean 'dinov2'"),
        ({"lora_path": "nowhere"}, "no LoRA file nowhere"),
        ({"batch_size": 17}, "use at most that"),
        ({"resolution": 60}, "60 is not a multiple"),
        ({"pretrained_model_name_or_path": "nowhere"}, "cannot load the model nowhere"),
        ({"sampler": "EulerDiscreteScheduler"}, "isn't fit for flow models: expected one of ode_euler"),
        ({"layouts": "geneval"}, "geneval: prompt 0"),
        ({"layouts": "hpsv2"}, "hpsv2: "),
        ({"num_image_per_prompt": 3}, "did you mean --num_images_per_prompt"),
        ({"reference_pictures": "nowhere"}, r"expected at least 2 of \.png"),
    ],
)
def test_bad_input_is_named_with_its_remedy(ask, folder, tmp_path, changes, message):
    (tmp_path / "csv.csv").write_text("prompt\na fox\n")
    (tmp_path / "empty.txt").write_text("\n")
    files = {"CSV": tmp_path / "csv.csv", "EMPTY": tmp_path / "empty.txt"}
    changes |= {flag: files[value] for flag, value in changes.items() if value in ("CSV", "EMPTY")}
    with pytest.raises(ValueError, match=message) as caught:
        ask(**changes)
    assert len(str(caught.value).splitlines()) < 4


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--num_images_per_prompt", "0", "must be a whole number of at least 1, got '0'"),
        ("--max_prompts", "0", "must be a whole number of at least 1, got '0'"),
        ("--num_inference_steps", "0", "must be a whole number from 1 to 1000, got '0'"),
        ("--guidance_scale", "0.5", "must be at least 1 (1 = no guidance"),
        ("--lora_scale", "nan", "must be a finite number above 0, got 'nan'"),
        ("--seed", "18446744073709551617", "must be a whole number from 0 to 2**63 - 1, got '1844"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, flag, value, message):
    needed = ["--pretrained_model_name_or_path", "x", "--prompts", "y", "--rewards", "z", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        parse([*needed, flag, value])
    assert f"argument {flag}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        parse(
            [
                "--pretrained_model_name_or_path",
                "x",
                "--prompts",
                "y",
                "--rewards",
                "z",
                "--output_dir",
                "o",
                f"--shard={text}",
            ]
        )
    assert "expected I/N" in capsys.readouterr().err


def test_a_model_folder_declares_what_its_pictures_need():
    plan = make_plan(
        parse(
            [
                *("--pretrained_model_name_or_path", TINY, "--prompts", "tiny", "--output_dir", "out"),
                *("--rewards", "pickscore", "hpsv2", "image_reward"),
            ]
        )
    )
    assert (plan.size, plan.max_sequence_length, len(plan.prompts)) == ((64, 64), 4, 56)
    assert [measure.model for measure in plan.measures[:3]] == [
        "asset:tiny_pickscore",
        "asset:tiny_hpsv2",
        "asset:tiny_image_reward",
    ]
    assert (plan.measures[3].kind, plan.measures[3].name) == ("features", "image_reward")


def test_loras_are_named_by_what_tells_them_apart(ask, folder, tmp_path):
    for run in ("one", "two"):
        for name in ("checkpoint-000100", "."):
            file = tmp_path / run / name / LORA_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "first" / LORA_FILE, file)
    runs = [str(tmp_path / run / "checkpoint-000100") for run in ("one", "two")]
    names = [candidate.name for candidate in ask(lora_path=runs).candidates]
    assert names == ["base", "one_checkpoint-000100", "two_checkpoint-000100"]
    plan = ask(lora_path=[f"mine={runs[0]}", runs[1]], lora_scale=[0.5, 1], num_inference_steps=[2, 3])
    assert [candidate.key for candidate in plan.candidates[:4]] == [
        "base-steps2-guidance1",
        "base-steps3-guidance1",
        "mine-scale0.5-steps2-guidance1",
        "mine-scale0.5-steps3-guidance1",
    ]
    assert {candidate.base for candidate in plan.candidates} == set(plan.candidates[:2])
    with pytest.raises(ValueError, match=r"asked for twice.*name each once"):
        ask(lora_path=runs[:1], lora_scale=[1, 1])
    with pytest.raises(ValueError, match="a name has letters"):
        lora_file(f"a b={runs[0]}")


@pytest.mark.parametrize("text", ["my run", "run #2", "50%", "a&b"])
def test_folders_with_other_characters_name_a_lora_too(ask, folder, tmp_path, text):
    for name in (text, "other"):
        shutil.copytree(folder / "first", tmp_path / "loras" / name)
    shutil.copy(folder / "first" / LORA_FILE, tmp_path / "loras" / f"{text}.safetensors")
    runs = [str(tmp_path / "loras" / name) for name in (text, "other", f"{text}.safetensors")]
    name = {"my run": "my-run", "run #2": "run-2", "50%": "50", "a&b": "a-b"}[text]
    assert [c.name for c in ask(lora_path=runs[:2]).candidates] == ["base", name, "other"]
    assert [c.name for c in ask(lora_path=runs[2:]).candidates] == ["base", name]


def test_lora_without_effect_is_refused_before_any_picture(ask, folder, tmp_path):
    plan = ask(lora_path=str(folder / "nothing"), output_dir=tmp_path)
    with pytest.raises(ValueError, match="it has no effect on this base model, or too much; was it trained"):
        do(plan)
    assert not list(tmp_path.glob("pictures/*/*.png"))


@pytest.mark.parametrize("name", ["broken", "first"])
def test_lora_of_another_base_or_broken_is_refused_before_any_picture(ask, folder, tmp_path, name):
    model = {"pretrained_model_name_or_path": TINY} if name == "first" else {}
    message = (
        "load it with the base model it was trained on|no place for key"
        if model
        else "cannot read the LoRA file"
    )
    with pytest.raises(ValueError, match=message):
        do(ask(lora_path=str(folder / name), output_dir=tmp_path, **model))
    assert not list(tmp_path.glob("pictures/*/*.png"))


def test_other_settings_do_not_mix_in_one_folder(ask, folder, tmp_path):
    do(ask(lora_path=str(folder / "first"), output_dir=tmp_path))
    with pytest.raises(
        ValueError, match=r"holds results of something else: seed was 0, now 1\. choose another"
    ):
        do(ask(lora_path=str(folder / "first"), output_dir=tmp_path, seed=1))
    with pytest.raises(ValueError, match="lora_sha256 was"):
        do(ask(lora_path=f"first={folder / 'second'}", output_dir=tmp_path))
    before = json.loads((tmp_path / "summary.json").read_text())
    do(ask(lora_path=[str(folder / "first"), str(folder / "second")], output_dir=tmp_path))
    after = json.loads((tmp_path / "summary.json").read_text())
    assert [each["key"] for each in after["candidates"]][:2] == [each["key"] for each in before["candidates"]]
    assert after["candidates"][1]["scores"] == before["candidates"][1]["scores"]
    assert len(after["candidates"]) == 3


def test_pictures_that_are_not_finite_are_refused_not_scored(ask, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"at scale 1e\+30 changes the velocity by .* or too much"):
        do(ask(lora_path=str(folder / "first"), lora_scale=1e30, output_dir=tmp_path / "scale"))
    monkeypatch.setattr(
        Model, "decode", lambda self, latents: torch.full((len(latents), 3, 64, 64), torch.nan)
    )
    with pytest.raises(ValueError, match="base-steps2-guidance1 makes NaN or infinity of 'a red fox'"):
        do(ask(lora_path=str(folder / "first"), output_dir=tmp_path / "decode"))
    assert not list(tmp_path.glob("*/pictures/*/*.png"))


def first_score(folder):
    return json.loads((folder / "scores.jsonl").read_text().splitlines()[0])["scores"]["pickscore"]


def test_changed_weights_at_the_same_place_are_noticed(ask, folder, tmp_path, tiny_sd3_dir):
    weights, model, out = tmp_path / "pickscore", tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder / "pickscore", weights)
    shutil.copytree(tiny_sd3_dir, model)
    asked = {"rewards": f"pickscore={weights}", "output_dir": out, "pretrained_model_name_or_path": model}
    do(ask(**asked))
    before = first_score(out)
    tensors = load_file(weights / "model.safetensors")
    save_file(tensors | {"logit_scale": tensors["logit_scale"] + 1}, weights / "model.safetensors")
    do(ask(**asked))
    assert first_score(out) == pytest.approx(before * math.e, rel=1e-4)
    config = model / "transformer/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match="base_weights was"):
        do(ask(**asked))


def test_a_picture_of_something_else_is_made_again(ask, folder, tmp_path, caplog):
    asked = {"lora_path": str(folder / "first"), "output_dir": tmp_path}
    do(ask(**asked))
    base, tuned = sorted(tmp_path.glob("pictures/*/00000-000.png"))
    content, scores = base.read_bytes(), (tmp_path / "scores.jsonl").read_text()
    shutil.copy(tuned, base)
    do(ask(**asked))
    assert "it is an image of" in caplog.text
    assert base.read_bytes() == content
    assert (tmp_path / "scores.jsonl").read_text() == scores


def test_a_lora_written_anew_meanwhile_is_noticed(ask, folder, tmp_path):
    shutil.copytree(folder / "first", tmp_path / "lora")
    plan = ask(lora_path=str(tmp_path / "lora"), output_dir=tmp_path / "out")
    lines = evaluate(plan, Processes(Accelerator()))
    next(lines)  # the folder is open, no picture is made
    shutil.copy(folder / "second" / LORA_FILE, tmp_path / "lora" / LORA_FILE)
    with pytest.raises(ValueError, match="lora_sha256 was"):
        list(lines)


def test_of_two_that_start_together_with_other_settings_one_is_refused(ask, tmp_path):
    plans = [ask(output_dir=tmp_path, seed=seed) for seed in (0, 1)]
    stores = [Store(tmp_path, plan.settings, plan.prompts.prompts, 1, plan.size) for plan in plans]
    refused = []

    def begin(store, barrier):
        barrier.wait()
        try:
            store.open(())
        except ValueError as error:
            refused.append(str(error))

    for _ in range(20):
        (tmp_path / "settings.json").unlink(missing_ok=True)
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=begin, args=(store, barrier)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(refused) == 20


def test_a_config_of_another_tool_says_nothing(tmp_path):
    lora = tmp_path / "x/lora" / LORA_FILE
    lora.parent.mkdir(parents=True)
    for text in ("rewards: [clip, other]\n", "rewards: [3]\ntrain_prompts: a\n", ": ["):
        (tmp_path / "x/config.yaml").write_text(text)
        assert run_config(lora) == {}
    ours = "pretrained_model_name_or_path: m\ntrain_prompts: t.txt\nrewards: [{name: hpsv2}]\n"
    (tmp_path / "x/config.yaml").write_text(ours)
    assert run_config(lora)["train_prompts"] == "t.txt"


def test_train_prompts_that_are_not_there_are_an_error_at_once(ask, folder, tmp_path):
    plan = ask(lora_path=str(folder / "first"), output_dir=tmp_path, train_prompts="nosuch.txt")
    with pytest.raises(ValueError, match=r"nosuch\.txt: no such file"):
        do(plan)
    assert not list(tmp_path.glob("pictures/*/*.png"))


def test_a_score_that_is_not_finite_names_the_picture_and_keeps_the_rest(ask, folder, tmp_path, monkeypatch):
    from am_diffusers.rewards import Brightness

    plan = ask(rewards=[f"pickscore={folder / 'pickscore'}", "brightness"], output_dir=tmp_path)
    monkeypatch.setattr(Brightness, "__call__", lambda self, images, prompts: images.mean((1, 2, 3)) / 0)
    with pytest.raises(ValueError, match=r"brightness gives inf for .*00000-000\.png \('a red fox'\)"):
        do(plan)
    assert list(tmp_path.glob("rewards/*/pickscore/*.safetensors"))
    monkeypatch.undo()
    assert any("PickScore" in line for line in do(plan))


def test_the_base_alone_is_scored_without_a_report(ask, tmp_path):
    do(ask(output_dir=tmp_path))
    (only,) = json.loads((tmp_path / "summary.json").read_text())["candidates"]
    assert only["name"] == "base"
    assert not (tmp_path / "report.html").exists()


def test_notes_tell_leaks_and_what_was_trained(ask, folder, tmp_path, tiny_sd3_dir):
    write_lora(tiny_sd3_dir, tmp_path / "run")
    (tmp_path / "train.txt").write_text("A red fox.\nthe moon\n")
    (tmp_path / "run/config.yaml").write_text(
        f"pretrained_model_name_or_path: elsewhere/other\ntrain_prompts: {tmp_path / 'train.txt'}\n"
        "rewards: [{name: brightness}]\n"
    )
    rewards = [f"pickscore={folder / 'pickscore'}", "brightness"]
    printed = do(ask(lora_path=str(tmp_path / "run"), output_dir=tmp_path / "out", rewards=rewards))
    assert any("1 evaluation prompts were trained on (0 exact, 1 reworded)" in line for line in printed)
    assert any("run was trained on elsewhere/other and is evaluated on" in line for line in printed)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    compared = summary["candidates"][1]["against_base"]["rewards"]
    assert {name: each["role"] for name, each in compared.items()} == {
        "pickscore": "held-out",
        "brightness": "trained",
    }
    page = (tmp_path / "out/report.html").read_text()
    assert "1 evaluation prompts were trained on" in page
    assert "<small>held-out</small>" in page


RUN = {
    "pretrained_model_name_or_path": "tiny",
    "train_prompts": "nowhere.txt",
    "rewards": [{"name": "pickscore", "weight": 0.5, "mean": 21.0, "std": 2.0}],
    "reward_scale": 3.0,
    "divergence": "kl",
    "transitions": "memoryless_local_linear",
    "num_inference_steps": 2,
    "rollout_guidance_scale": 1.0,
}


@pytest.fixture
def run_of(tmp_path, tiny_sd3_dir):
    """A function from changes of a run's config to the LoRA in its folder."""
    write_lora(tiny_sd3_dir, tmp_path / "run")

    def write(**changes):
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(RUN | changes))
        return str(tmp_path / "run")

    return write


def test_a_run_names_what_it_aimed_at(ask, run_of):
    known = targets(ask(lora_path=run_of()).candidates)
    assert known == {"run": Target(3.0, {"pickscore": RewardScale(0.5, 21.0, 2.0)})}


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "js"},
        {"reward_scale": "auto"},
        {"reward_scale": -1.0},
        {"rewards": [{"name": "pickscore"}]},
        {"rewards": [{"name": "pickscore", "weight": 1.0, "mean": 0.0, "std": 0.0}]},
    ],
)
def test_a_run_that_aimed_at_no_tilt_or_does_not_say_at_which_has_no_target(ask, run_of, changes):
    assert targets(ask(lora_path=run_of(**changes)).candidates) == {}


def test_a_config_of_another_run_is_not_that_of_a_lora_which_names_its_own(ask, run_of, tmp_path):
    """Seed 1's LoRA beside the config of seed 2: what the LoRA says counts, and it needs no config."""
    origin = Origin(
        base_model="tiny",
        base_model_sha256="0" * 64,
        method="adjoint_matching",
        rewards=[TrainedReward("pickscore", 0.5, 21.0, 2.0)],
        divergence="kl",
        reward_scale=3.0,
        seed=1,
        iteration=2,
    )
    own, target = (
        {"method": "adjoint_matching", "seed": 1},
        Target(3.0, {"pickscore": RewardScale(0.5, 21, 2)}),
    )
    lora = Path(run_of(**own, reward_scale=5.0)) / LORA_FILE
    lora.write_bytes(to_bytes(load_file(lora), origin.metadata()))
    assert run_config(lora)["reward_scale"] == 3.0
    assert "train_prompts" not in run_config(lora)
    assert targets(ask(lora_path=str(lora)).candidates) == {"run": target}
    make_notes(ask(lora_path=str(lora)))
    run_of(**(own | {"seed": 2}))
    assert "train_prompts" not in run_config(lora)
    run_of(**own)
    assert run_config(lora)["train_prompts"] == "nowhere.txt"


def test_notes_tell_what_the_comparison_with_the_tilt_holds_for(ask, run_of):
    def told(sampler="memoryless_local_linear", **changes):
        notes = make_notes(ask(lora_path=run_of(), sampler=sampler, **changes))
        return [note for note in notes if "tilt" in note]

    few = (
        "--num_images_per_prompt 1 is little to tell what the tilt of the base would give: 64 does for "
        "moderate reward scales"
    )
    assert told() == [few]
    assert told(num_images_per_prompt=16) == []
    assert told(sampler="ode_euler") == []
    assert told(num_images_per_prompt=16, num_inference_steps=[2, 5]) == [
        "run was trained with 2 steps of memoryless_local_linear, guidance 1.0, and is compared with the "
        "tilt of 5 steps of memoryless_local_linear, guidance 1.0: what is predicted holds for the latter"
    ]


def test_an_evaluation_by_the_chain_of_training_is_compared_with_its_tilt(ask, run_of, tmp_path):
    chain = {"sampler": "memoryless_local_linear", "num_images_per_prompt": 8}
    printed = do(ask(lora_path=run_of(), output_dir=tmp_path / "out", **chain))
    (_, tuned) = json.loads((tmp_path / "out/summary.json").read_text())["candidates"]
    tilt = tuned["against_base"]["tilt"]
    assert tilt["reward_scale"] == 3.0
    assert tilt["certificate"]["path_kl"] == tuned["against_base"]["path_kl"]
    assert any("| excess KL |" in line or "| best of n |" in line for line in printed)
    assert "Against the tilt" in (tmp_path / "out/report.html").read_text()


def test_every_solver_has_its_pictures_and_the_sde_its_path_kl(ask, folder, tmp_path):
    for sampler in ("memoryless_local_linear", "FlowMatchHeunDiscreteScheduler"):
        out = tmp_path / sampler
        do(ask(lora_path=str(folder / "first"), output_dir=out, sampler=sampler, num_inference_steps=3))
        (_, tuned) = json.loads((out / "summary.json").read_text())["candidates"]
        path_kl = tuned["against_base"]["path_kl"]
        assert (path_kl is not None) == (sampler == "memoryless_local_linear")
        assert path_kl is None or path_kl["value"] > 0


def test_frechet_distance_to_reference_pictures(ask, folder, tmp_path):
    do(ask(lora_path=str(folder / "first"), output_dir=tmp_path / "a"))
    base = tmp_path / "a/pictures/base-steps2-guidance1"
    again = ask(lora_path=str(folder / "first"), output_dir=tmp_path / "a", reference_pictures=base)
    do(again)
    candidates = json.loads((tmp_path / "a/summary.json").read_text())["candidates"]
    distances = [candidate["reference"]["pickscore"] for candidate in candidates]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[1] > 1e-3
