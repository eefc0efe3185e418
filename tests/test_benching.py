"""The benchmark of methods: what is declared, run, skipped, chosen and compared."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from finetune_runs import write_rewards
from PIL import Image

from am_diffusers.command_line import parse_config
from am_diffusers.comparison import Estimate
from am_diffusers.methods import METHODS
from am_diffusers.models.lora import LORA_FILE
from benching.curves import Curve, difference, make_curve
from benching.figures import draw
from benching.records import Record, Reward, Snapshot, read_record, record_file, write_record
from benching.sheet import draw_sheet, pictures_of
from benching.study import EvaluationOptions, Mark, Study, command_line, read_study
from benching.tables import budget_table, equal_reward_table
from benching.work import Work

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "eval/benching").glob("*.yaml"))
OPTIONS = EvaluationOptions("prompts.txt", ["pickscore", "hpsv2"], 2, 2)
P = 8


def study(settings: dict[str, str], **changes: object) -> Study:
    """Settings by name with their methods."""
    marks = [Mark(seconds=10.0), Mark(seconds=20.0)]
    flags = {name: {"method": method} for name, method in settings.items()}
    made = Study("", marks, "20-s", [0, 1], "best", {"reward_scale": 2.0}, flags, OPTIONS)
    return dataclasses.replace(made, **changes)


def snapshot(mark: str, seconds: float, trained: float, held_out: float, calls: float = 0) -> Snapshot:
    def reward(role: str, gain: float) -> Reward:
        by_prompt = gain + np.linspace(-0.1, 0.1, P)
        return Reward(role, Estimate(gain, None, None), by_prompt.tolist())

    rewards = {"pickscore": reward("trained", trained), "hpsv2": reward("held-out", held_out)}
    kept = Estimate(1 - trained / 10, None, None)
    return Snapshot(mark, seconds, calls, int(seconds), rewards, kept, trained / 100)


def record(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> Record:
    """A record whose trained and held-out gain grow linearly to `gains`."""
    trained, held_out = gains
    half = snapshot("10-s", 10, trained / 2, held_out / 2, calls=50)
    snapshots = [half, snapshot("20-s", 20, trained, held_out, calls=100)]
    method = str(work.study.flags(setting)["method"])
    return Record(setting, method, seed, work.declared(setting), {}, snapshots)


def put(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> None:
    write_record(record(work, setting, gains, seed), record_file(work.data, setting, seed))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_declared_setting_is_a_config_that_finetune_takes(file: Path) -> None:
    declared = read_study(file)
    for setting in declared.settings:
        flags = declared.flags(setting)
        config = parse_config(command_line({**flags, "output_dir": "out"}))
        assert config.method.method == flags["method"]
        assert config.method.rewards[0].model == "asset:tiny_pickscore"
        assert config.optimizer.lr_scheduler == "constant"  # a run's length is not known when it starts


def test_all_methods_are_in_the_benchmark_on_the_same_terms() -> None:
    declared = read_study(ROOT / "eval/benching/methods.yaml")
    assert set(declared.methods) == set(METHODS)
    own = {name for flags in declared.settings.values() for name in flags}
    assert not own & {"train_batch_size", "rewards", "rank", "train_prompts", "mixed_precision"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marks": [{"seconds": 1, "calls": 2}]}, "one of seconds"),
        ({"marks": [{}]}, "one of seconds"),
        ({"budget": "3-s"}, "budget 3-s: expected one of"),
        ({"setings": {}}, "setings: Unexpected"),
        ({"settings": {name: {"method": "draft"} for name in "abcd"}}, "draft has 4 settings, at most 3"),
        ({"seeds": 1}, "seeds: .* list"),
    ],
)
def test_a_wrong_study_is_refused_by_name(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "eval/benching/methods.yaml").read_text())
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(document))
    assert len(read_study(file).settings) > 10
    file.write_text(yaml.safe_dump(document | changes))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*{message}"):
        read_study(file)
    file.unlink()
    with pytest.raises(ValueError, match="can't be read"):
        read_study(file)


@pytest.mark.parametrize(
    ("mark", "name", "before", "after"),
    [
        (Mark(seconds=80), "80-s", (79.9, 1e9, 999), (80, 0, 0)),
        (Mark(calls=12000), "12000-calls", (1e9, 11999, 999), (0, 12000, 0)),
        (Mark(iterations=10), "10-iterations", (1e9, 1e9, 9), (0, 0, 10)),
    ],
)
def test_a_mark_is_passed_by_its_own_count(
    mark: Mark, name: str, before: tuple[float, float, int], after: tuple[float, float, int]
) -> None:
    assert mark.name == name
    assert not mark.passed(*before)
    assert mark.passed(*after)


def test_a_record_reads_back_with_short_numbers_and_is_refused_if_the_setting_changed(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path, tmp_path)
    made = record(work, "a", (1 / 3, 0.1))
    file = record_file(tmp_path, "a", 0)
    write_record(made, file)
    found = read_record(file, work.declared("a"))
    assert found.at("20-s").gain("trained") == 0.33333
    assert dataclasses.replace(found, snapshots=made.snapshots) == made
    changed = dataclasses.replace(work, study=study({"a": "adjoint_matching"}, common={"reward_scale": 3.0}))
    with pytest.raises(ValueError, match="other flags than are declared now: remove it"):
        changed.record("a", 0)
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match="no record that can be read"):
        work.record("a", 0)


def test_settings_run_on_the_first_seed_and_the_chosen_ones_on_the_others(tmp_path: Path) -> None:
    settings = {"a": "adjoint_matching", "b": "adjoint_matching", "c": "draft"}
    work = Work(study(settings), tmp_path, tmp_path)
    assert list(work.missing()) == [("a", 0), ("b", 0), ("c", 0)]
    put(work, "a", (0.9, 0.1))
    put(work, "c", (0.5, 0.0))
    # Nothing is chosen of a method before all its settings were tried.
    assert list(work.missing()) == [("b", 0), ("c", 1)]
    put(work, "b", (0.3, 0.2))
    assert work.chosen("adjoint_matching") == "b"  # by the held-out reward, not the trained one
    assert list(work.missing()) == [("b", 1), ("c", 1)]
    put(work, "b", (0.4, 0.2), seed=1)
    assert {name: len(records) for name, records in work.compared().items()} == {"b": 2, "c": 1}
    everything = dataclasses.replace(work, study=study(settings, select="all"))
    assert list(everything.missing()) == [("a", 1), ("c", 1)]


def test_a_run_that_another_program_does_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(
        study({"a": "adjoint_matching", "b": "draft"}, seeds=[0]), tmp_path / "data", tmp_path / "out"
    )
    done: list[str] = []

    def do(self: Work, setting: str, seed: int, folder: Path) -> None:
        done.append(folder.name)
        put(self, setting, (0.1, 0.1), seed)

    monkeypatch.setattr(Work, "_do", do)
    work.outputs.mkdir()
    with FileLock(work.outputs / "a-seed0.lock"):
        assert work.do_next() == "b-seed0"
        assert work.do_next() is None
    assert work.do_next() == "a-seed0"
    assert done == ["b-seed0", "a-seed0"]


def test_a_run_trains_to_its_marks_and_is_evaluated_at_each(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """The real trainer and evaluation on random models."""
    write_rewards(tmp_path)
    (tmp_path / "train.txt").write_text("a red apple\na small green frog\n")
    (tmp_path / "eval.txt").write_text("an orange fox\na grey sea\n")
    models = {name: str(tmp_path / name) for name in ("pickscore", "hpsv2")}
    common = {
        "pretrained_model_name_or_path": str(tiny_sd3_dir),
        "resolution": 64,
        "max_sequence_length": 8,
        "train_prompts": str(tmp_path / "train.txt"),
        "rewards": [{"name": "pickscore", "model": models["pickscore"]}],
        "train_batch_size": 2,
        "num_inference_steps": 3,
        "learning_rate": 1e-2,
    }
    rewards = [f"{name}={model}" for name, model in models.items()]
    tiny = Study(
        description="",
        marks=[Mark(iterations=1), Mark(calls=3 * 2 * 7)],
        budget="42-calls",
        seeds=[0],
        select="best",
        common=common,
        settings={"am": {"method": "adjoint_matching"}},
        evaluation=EvaluationOptions(str(tmp_path / "eval.txt"), rewards, 2, 2),
    )
    work = Work(tiny, tmp_path / "data", tmp_path / "out")
    assert work.do_next() == "am-seed0"
    assert work.do_next() is None
    found = work.record("am", 0)
    assert found is not None
    # An iteration takes 2 rollout, 2 adjoint, 2 loss calls and one of the base at step 0, for 2 samples.
    assert [(s.mark, s.iterations, s.calls) for s in found.snapshots] == [
        ("1-iterations", 1, 14),
        ("42-calls", 3, 42),
    ]
    lines = [json.loads(line) for line in (tmp_path / "out/am-seed0/metrics.jsonl").read_text().splitlines()]
    assert found.snapshots[1].seconds == pytest.approx(sum(line["seconds"] for line in lines), rel=1e-4)
    for made in found.snapshots:
        assert {name: reward.role for name, reward in made.rewards.items()} == {
            "pickscore": "trained",
            "hpsv2": "held-out",
        }
        for reward in made.rewards.values():
            assert np.mean(reward.by_prompt) == pytest.approx(reward.gain.value, abs=1e-4)
            assert reward.gain.value != 0
    first, second = ((tmp_path / "out/am-seed0" / s.mark / LORA_FILE).read_bytes() for s in found.snapshots)
    assert first != second


def curve(work: Work, setting: str, gains: tuple[float, float], seeds: int = 1) -> Curve:
    return make_curve([record(work, setting, gains, seed) for seed in range(seeds)])


def test_points_of_equal_trained_reward_are_found_between_marks(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    fast, slow = curve(work, "a", (0.8, 0.4)), curve(work, "b", (0.2, 0.02))
    at, end = fast.where(0.2), slow.where(0.2)
    assert at is not None
    assert end is not None
    # A quarter of the way that is linear all along.
    assert (at.seconds, at.calls) == pytest.approx((5, 25))
    assert (at.gain("trained"), at.gain("held-out")) == pytest.approx((0.2, 0.1 - 0.0))
    assert at.diversity == pytest.approx(0.98)
    assert (end.seconds, end.gain("held-out")) == pytest.approx((20, 0.02))
    assert slow.where(0.21) is None
    apart = difference(at, end, "held-out")
    assert apart.value == pytest.approx(0.08)
    row = equal_reward_table(fast, [slow], timed=True).splitlines()[2]
    assert row.startswith("| b | +0.20 | +0.10 | +0.02 | +0.08 [")
    assert row.endswith("| 98%, 98% | 0.002, 0.002 | 4.00 | 4.00 |")
    untimed = equal_reward_table(fast, [slow], timed=False).splitlines()
    assert untimed[2].endswith("| 0.002, 0.002 | 4.00 |")
    assert [line.count("|") for line in untimed] == [9] * 3


def test_means_over_seeds_with_their_spread(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path, tmp_path)
    both = make_curve([record(work, "a", (0.2, 0.1), 0), record(work, "a", (0.4, 0.3), 1)])
    assert both.at("20-s").gain("trained") == pytest.approx(0.3)
    assert both.spread["20-s"] == pytest.approx((0.2, 0.4))
    row = budget_table([both], "20-s", timed=True).splitlines()[2]
    assert row.startswith("| a | 2 | 20 | 20 | 100 | +0.30 [+0.2")
    assert "| +0.20 to +0.40 | 97% | 0.003 |" in row


def test_the_figure_is_drawn_large_enough_to_read(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    file = tmp_path / "figure.png"
    draw([curve(work, "a", (0.8, 0.4)), curve(work, "b", (0.2, 0.02))], "seconds", file)
    with Image.open(file) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_sheet_has_a_row_for_each_setting_whose_pictures_are_there(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path / "data", tmp_path)
    folders = {"base": "base-steps2-guidance1", "a": "a-seed0-20-s-scale1-steps2-guidance1"}
    for place, folder in enumerate(folders.values()):
        for prompt in range(20):
            file = tmp_path / "evaluation/pictures" / folder / f"{prompt:05d}-000.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (100 * place, 10 * prompt, 0)).save(file)
    found = pictures_of(work, ["a", "b"])
    assert list(found) == ["base", "a"]
    assert [file.name for file in found["a"]] == [f"{prompt:05d}-000.png" for prompt in range(0, 20, 2)]
    file = tmp_path / "sheet.png"
    draw_sheet(found, ["a fox, flat style, on a blue background"] * 10, file)
    with Image.open(file) as image:
        colours = [colour for _, colour in image.getcolors(1 << 24) or []]
    assert {(100 * place, 20 * column, 0) for place in range(2) for column in range(10)} <= set(colours)
