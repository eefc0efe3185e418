import dataclasses
import re
import typing
from pathlib import Path

import pytest
from diffusers.optimization import SchedulerType

from am_diffusers.config import Config, LrSchedule, RewardConfig, section_types
from am_diffusers.config.command_line import parse_config, to_yaml
from am_diffusers.config.hints import HINTS
from am_diffusers.config.values import field_types
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.settings import FOR_ALL, SharedSettings
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import asset_path
from am_diffusers.transitions import TRANSITIONS
from cli_surface import FILE, cli_surface

BUFFERED = "buffered_adjoint_matching"
FLAGS = field_types()
SECTIONS = section_types()
MINIMAL = """
pretrained_model_name_or_path: asset:tiny_sd3
train_prompts: prompts.txt
output_dir: out
rewards: [{name: pickscore, model: asset:tiny_pickscore}]
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return ["--config", str(path)]


def test_command_line_wins_over_yaml_wins_over_defaults(minimal, tmp_path):
    (tmp_path / "more.yaml").write_text("learning_rate: 1e-5\nrank: 4\n")
    config = parse_config([*minimal, "--config", str(tmp_path / "more.yaml"), "--rank", "8"])
    assert (config.optimizer.learning_rate, config.model.rank, config.run.seed) == (1e-5, 8, 0)
    assert config.method.rewards == [RewardConfig("pickscore", "asset:tiny_pickscore")]


@pytest.mark.parametrize("name", ["rewards", "eval_rewards"])
def test_a_later_list_of_rewards_replaces_an_earlier_one(minimal, tmp_path, name):
    """Also one of the same length, and all of an item: no weights of another reward are left in it."""
    files = [tmp_path / f"{place}.yaml" for place in range(3)]
    files[0].write_text(f"{name}: [{{name: pickscore, model: mine, weight: 2.0}}]")
    files[1].write_text(f"{name}: [{{name: brightness}}]")
    files[2].write_text("seed: 3")
    section = {"rewards": "method", "eval_rewards": "evaluation"}[name]

    def parsed(*argv):
        return getattr(getattr(parse_config([*minimal, *argv]), section), name)

    before = ["--config", str(files[0])]
    assert parsed(*before, "--config", str(files[2]))[0].model == "mine"
    for later in (
        ["--config", str(files[1])],
        [f"--config={files[1]}"],
        [f"--{name}", "[{name: brightness}]"],
        [f"--{name}=[{{name: brightness}}]"],
    ):
        assert parsed(*before, *later) == [RewardConfig("brightness")], later


def test_resolved_yaml_reads_back_to_the_same_config(minimal, tmp_path):
    flags = ["--adam_epsilon", "1e-9", "--loss_steps", "4", "--validation_prompts", '["a: b", "-c"]']
    config = parse_config([*minimal, *flags])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "resolved.yaml")]) == config


def test_printed_config_reads_back_to_the_same_config(minimal, tmp_path, capsys):
    flags = ["--validation_prompts", '["a: b", "Bär # 1", "no"]', "--adam_epsilon", "1e-9", "--allow_tf32"]
    with pytest.raises(SystemExit) as stopped:
        parse_config([*minimal, "--print_config", *flags])
    assert not stopped.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_config(["--config", str(tmp_path / "printed.yaml")]) == parse_config([*minimal, *flags])


def test_a_config_that_would_be_refused_is_not_printed(minimal, capsys):
    with pytest.raises(ValueError, match="--rank must be positive"):
        parse_config([*minimal, "--print_config", "--rank", "0"])
    assert capsys.readouterr().out == ""


def test_flags_are_those_of_the_committed_list():
    """A changed flag, type or default changes runs of other people: it is to be seen in a review."""
    assert FILE.read_text().splitlines() == cli_surface(), "run `make cli-surface` if that is on purpose"


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--gradient_accumulation_steps", "4"], "loss_micro_batch_size"),
        (["--instance_prompt=a photo of sks dog"], "train_prompts"),
        (["--with_prior_preservation"], "train_prompts"),
        (["--num_train_epochs", "3", "--seed", "1"], "max_train_steps"),
        (["--hub_token", "hf_secret"], "HF_TOKEN"),
        (["--num_processes", "2"], "accelerate launch --num_processes"),
    ],
)
def test_flags_of_other_scripts_get_a_hint(minimal, flags, hint):
    name = flags[0].removeprefix("--").split("=")[0]
    with pytest.raises(ValueError, match=f"there is no '{name}' here: .*{hint}") as caught:
        parse_config([*minimal, *flags])
    assert "secret" not in str(caught.value)


def test_hints_name_flags_that_exist_for_flags_that_do_not():
    assert not set(HINTS) & set(FLAGS)
    for name, hint in HINTS.items():
        named = set(re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", hint))
        assert named <= set(FLAGS), name


@pytest.mark.parametrize("switch", [["--dry_run"], ["--dry_run", "true"], ["--dry_run", "--seed", "3"]])
def test_boolean_flags_may_stand_alone(minimal, switch):
    assert parse_config([*minimal, *switch]).run.dry_run
    assert not parse_config([*minimal, "--dry_run", "false"]).run.dry_run


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learnig_rate", "1"], "'learnig_rate': did you mean 'learning_rate'"),
        (["--step_selection", "pps"], "--step_selection must be left out with loss_steps all"),
        (["--guidance_mode", "none", "--rollout_guidance_scale", "3"], "must be 1 with guidance_mode none"),
        (["--guidance_mode", "everywhere"], "--rollout_guidance_scale must be other than 1"),
        (["--method", BUFFERED, "--buffer_refresh", "0"], "--buffer_refresh must be from 1 to 1000, got 0"),
        (["--buffer_size", "32"], "--buffer_size is for buffered_adjoint_matching, not for adjoint_matching"),
        (["--num_inference_step=5"], "'num_inference_step': did you mean 'num_inference_steps'"),
        (['--rewards+={"name": "hpsv2", "wieght": 2}'], "'wieght': did you mean 'weight'"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--pairing", "up"], "pairing"),
        (["--num_inference_steps", "1"], "--num_inference_steps must be from 2 to 1000"),
        (["--mask_quantile", "0"], r"--mask_quantile must be in \(0, 1\)"),
        (["--rewards", "[]"], "--rewards must be a list with at least one reward, got"),
        (["--loss_steps", "20"], "--loss_steps must be 'all' or from 1"),
        (["--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--num_validation_prompts", "0"], "--num_validation_prompts must be at least 1"),
        (["--loss_micro_batch_size", "0", "--rank", "0"], "rank(.|\n)*loss_micro_batch_size"),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit must be at least 1 or null, got 0"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1 or null, got 0"),
        (["--max_train_prompts", "0"], "--max_train_prompts must be at least 1 or null, got 0"),
        (["--max_eval_prompts", "0"], "--max_eval_prompts must be at least 1 or null, got 0"),
        (["--rollout_micro_batch_size", "0"], "--rollout_micro_batch_size must be at least 1, auto or null"),
        (["--adam_beta1=-1"], r"--adam_beta1 must be in \[0, 1\), got -1.0"),
        (["--adam_beta2", "1"], r"--adam_beta2 must be in \[0, 1\), got 1.0"),
        (["--adam_epsilon", "0"], "--adam_epsilon must be positive, got 0.0"),
        (["--adam_weight_decay=-1"], "--adam_weight_decay must be 0 or positive, got -1.0"),
        (["--lr_scheduler", "linear", "--lr_warmup_steps=-1"], "--lr_warmup_steps must be 0 or positive"),
        (["--num_inference_steps", "1e18"], "--num_inference_steps must be from 2 to 1000"),
        (["--eval_inference_steps", "1e18"], "--eval_inference_steps must be a whole number from 1 to 1000"),
        (["--tail_samples", "1e18"], "--tail_samples must be from 1 to 1000"),
        (["--eval_guidance_scale", "0"], "--eval_guidance_scale must be at least 1 .*, got 0.0"),
        (["--rollout_guidance_scale", "0.5"], "--rollout_guidance_scale must be at least 1 .*, got 0.5"),
        (["--seed", "18446744073709551617"], r"--seed must be .*2\*\*63 - 1.*, got 18446"),
        (["--seed=-1"], "--seed must be a whole number from 0"),
        (["--logging_dir", "../tb"], r"--logging_dir must be a folder inside output_dir, got \.\./tb"),
        (["--logging_dir", "/tmp/tb"], "--logging_dir must be a folder inside output_dir, got /tmp/tb"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["stray"], "stray"),
    ],
)
def test_bad_values_are_named_on_one_screen(minimal, extra, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_config([*minimal, *extra])
    assert len(str(caught.value).splitlines()) < 12


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--buffer_size", "40"], "--buffer_size must be a multiple of train_batch_size"),
        (["--adjoint", "full"], "--adjoint must be lean with a buffer"),
        (["--max_sequence_length", "600"], "max_sequence_length is 600, expected 1 to 512"),
    ],
)
def test_flags_that_only_method_or_model_can_judge_are_refused_by_the_plan(minimal, extra, message):
    config = parse_config([*minimal, "--method", BUFFERED, *extra])
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(config, 1)
    assert len(str(caught.value).splitlines()) < 12


def test_a_config_that_is_not_utf8_is_named(minimal, tmp_path):
    file = tmp_path / "notepad.yaml"
    file.write_bytes("rank: 4\n".encode("utf-16"))
    with pytest.raises(ValueError, match=f"--config {file}: it is UTF-16: save it as UTF-8"):
        parse_config([*minimal, "--config", str(file)])


def test_unknown_yaml_key_names_the_nearest(minimal, tmp_path):
    (tmp_path / "typo.yaml").write_text("reward_scal: 3\n")
    with pytest.raises(ValueError, match="'reward_scal': did you mean 'reward_scale'"):
        parse_config([*minimal, "--config", str(tmp_path / "typo.yaml")])


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"required: .*pretrained_model_name_or_path.*rewards"):
        parse_config([])


def test_every_field_has_a_sentence_and_a_name_of_its_own():
    """A flag in the sections of several methods is that of one class, from which they inherit it."""
    owners: dict[str, type] = {}
    for section in [*SECTIONS.values(), RewardConfig]:
        for field in dataclasses.fields(section):
            (owner,) = (
                kind for kind in section.__mro__ if field.name in vars(kind).get("__annotations__", ())
            )
            assert f"        {field.name}: " in (owner.__doc__ or ""), field.name
            if section is not RewardConfig:
                assert owners.setdefault(field.name, owner) is owner, field.name
    assert set(owners) == set(FLAGS)


def test_no_flag_is_accepted_and_ignored():
    """Every field is read where config becomes objects, or by the methods, beyond the check of its range."""
    root = Path(__file__).parents[2]
    package = root / "am_diffusers"
    readers = [*sorted((package / "run").rglob("*.py")), *sorted((package / "methods").rglob("*.py"))]
    source = "".join(path.read_text() for path in [*readers, root / "scripts/finetune.py"])
    fields = [*FLAGS, *(field.name for field in dataclasses.fields(RewardConfig))]
    read_as = {"reward_scale": "scale"}  # a number, also where the flag is auto
    missing = [n for n in fields if not re.search(rf"(?<!\bself)\.{read_as.get(n, n)}\b", source)]
    assert missing == []


def test_a_flag_of_another_method_is_refused(minimal, monkeypatch):
    reads_nothing = type("Other", (METHODS["adjoint_matching"],), {"reads": ()})
    monkeypatch.setitem(METHODS, "other", reads_nothing)
    with pytest.raises(
        ValueError, match=r"--pairing is for adjoint_matching, .*, not for other: leave it out"
    ):
        parse_config([*minimal, "--method", "other", "--pairing", "left"])
    assert parse_config([*minimal, "--method", "other"]).method.method == "other"
    shared = {field.name for field in dataclasses.fields(SharedSettings)} - set(FOR_ALL)
    for method in METHODS.values():
        own = {field.name for field in dataclasses.fields(method.Settings)}
        assert set(method.reads) <= shared | {"offload_trajectories"}
        assert {*method.decisive, *method.free} <= own


def test_lr_schedules_are_those_of_diffusers_that_need_no_further_argument():
    assert set(typing.get_args(LrSchedule)) == {s.value for s in SchedulerType} - {"piecewise_constant"}


def test_every_stochastic_table_can_be_chosen():
    choices = typing.get_args(typing.get_type_hints(SharedSettings)["transitions"])
    assert set(choices) == set(TRANSITIONS) - {"ode_euler"}


def test_unknown_asset_is_an_error():
    assert asset_path("some/folder") == "some/folder"
    with pytest.raises(ValueError, match="asset:nothing: no such asset"):
        asset_path("asset:nothing")


def test_config_is_frozen(minimal):
    config = parse_config(minimal)
    assert isinstance(config, Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.rank = 3  # pyright: ignore[reportAttributeAccessIssue]
