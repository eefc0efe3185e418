"""The benchmark of methods: what is declared, run, skipped, chosen and compared."""

import dataclasses
import json
import re
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.run.base_scores import CERTIFICATE
from am_diffusers.training.trainer import IterationError, Trainer
from bench_records import put, record, study
from benching.images.certifying import read_frontier
from benching.images.measuring import judged_shares
from benching.images.records import Judged, read_record, record_file, write_record
from benching.images.study import CertificateOptions, EvaluationOptions, Mark, Study, command_line, read_study
from benching.images.work import Work
from finetune_runs import write_rewards

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "eval/benching").glob("*.yaml"))


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
    assert set(read_study(file).settings) == set(document["settings"])
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
    with pytest.raises(ValueError, match="can't be read as a record"):
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


def test_a_run_that_fails_is_a_result_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"a": "adjoint_matching", "b": "adjoint_matching", "c": "draft"}
    work = Work(study(settings, seeds=[0]), tmp_path / "data", tmp_path / "out")

    def train(flags: dict[str, object], *rest: object) -> list[object]:
        raise IterationError("iteration 3: loss is nan")

    monkeypatch.setattr("benching.images.work.train", train)
    put(work, "b", (0.1, 0.1))
    assert work.do_next() == "a-seed0"
    assert work.do_next() == "c-seed0"
    assert work.do_next() is None
    assert work.chosen("adjoint_matching") == "b"
    assert work.chosen("draft") is None
    assert list(work.compared()) == ["b"]


def test_runs_that_are_timed_are_of_one_thread_and_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}, seeds=[0]), tmp_path, tmp_path)
    monkeypatch.setattr("benching.images.work.machine", lambda: {"threads": "2"})
    with pytest.raises(ValueError, match="OMP_NUM_THREADS=1"):
        work.do_next()
    put(work, "a", (0.2, 0.1))
    put(work, "b", (0.2, 0.1))
    assert work.do_next() is None  # nothing to run, so nothing to ask for
    other = dataclasses.replace(record(work, "b", (0.2, 0.1)), machine={"device": "another"})
    write_record(other, record_file(tmp_path, "b", 0))
    with pytest.raises(ValueError, match=r"b on .*another.*can't be compared"):
        work.compared()


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path, tmp_path)
    put(work, "a", (0.2, 0.1))
    record_file(tmp_path, "a", 0).rename(record_file(tmp_path, "a", 1))
    with pytest.raises(ValueError, match="is the record of a, seed 0"):
        work.record("a", 1)


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


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations that wait half a second for others, as on a busy machine."""
    iterate = Trainer.iterate

    def wait(self: Trainer) -> dict[str, float]:
        time.sleep(0.5)
        return iterate(self)

    monkeypatch.setattr(Trainer, "iterate", wait)


@pytest.mark.usefixtures("waiting")
def test_a_run_trains_to_its_marks_and_is_evaluated_at_each(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """The real trainer and evaluation on random models."""
    write_rewards(tmp_path)
    (tmp_path / "train.txt").write_text("a red apple\na small green frog\n")
    (tmp_path / "eval.txt").write_text("an apple on a blue background\na heart on a red background\n")
    models = {name: str(tmp_path / name) for name in ("pickscore", "hpsv2")}
    common = {
        "pretrained_model_name_or_path": str(tiny_sd3_dir),
        "resolution": 64,
        "max_sequence_length": 8,
        "train_prompts": str(tmp_path / "train.txt"),
        "rewards": [{"name": "pickscore", "model": models["pickscore"]}],
        "train_batch_size": 2,
        "num_inference_steps": 3,
        "tail_samples": 1,
        "learning_rate": 1e-2,
    }
    rewards = [f"{name}={model}" for name, model in models.items()]
    chain = CertificateOptions(num_inference_steps=2, num_prompts=2, base_images=8, images=2, reward_scale=3)
    tiny = Study(
        description="",
        marks=[Mark(iterations=1), Mark(calls=3 * 2 * 7)],
        budget="42-calls",
        seeds=[0],
        select="best",
        common=common,
        settings={"am": {"method": "adjoint_matching"}},
        evaluation=EvaluationOptions(str(tmp_path / "eval.txt"), rewards, 2, 2, chain),
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
    assert (
        0 < found.snapshots[1].seconds < sum(line["seconds"] for line in lines) + 0.5
    )  # of 1.5 s of waiting
    for made in found.snapshots:
        assert {name: reward.role for name, reward in made.rewards.items()} == {
            "pickscore": "trained",
            "hpsv2": "held-out",
        }
        for reward in made.rewards.values():
            assert np.mean(reward.by_prompt) == pytest.approx(reward.gain.value, abs=1e-4)
            assert reward.gain.value != 0
        assert all(len(each) == 2 for each in (*vars(made.judged).values(), *vars(made.judged_base).values()))
        assert (np.array(made.judged.right) <= np.array(made.judged.clean)).all()
        assert min(made.chain.path_kl) > 0
        assert all(made.chain.gain)
    base = work.base_scores / CERTIFICATE
    scored = base.stat().st_mtime_ns
    assert read_frontier(tiny, work.base_scores).rewards.shape == (2, 8)
    first, second = ((tmp_path / "out/am-seed0" / s.mark / LORA_FILE).read_bytes() for s in found.snapshots)
    assert first != second
    # Another attempt, as after a kill, has other LoRAs where a mark is a time: what the first left goes.
    evaluation = tmp_path / "out/evaluation/pictures"
    stale = evaluation / "am-seed0-1-iterations-scale1-steps2-guidance1/candidate.json"
    stale.write_text(stale.read_text().replace('"lora_sha256": "', '"lora_sha256": "0'))
    record_file(work.data, "am", 0).unlink()
    assert work.do_next() == "am-seed0"
    again = work.record("am", 0)
    assert again is not None
    assert again.snapshots[0].rewards == found.snapshots[0].rewards
    assert again.snapshots[0].chain == found.snapshots[0].chain
    assert base.stat().st_mtime_ns == scored  # once per study


def test_a_right_image_counts_only_if_it_is_clean() -> None:
    clean, right = np.array([[1.0, 1, 0, 0], [0, 0, 0, 0]]), np.array([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    assert judged_shares({"world_clean": clean, "world_right": right}) == Judged([0.5, 0], [0.25, 0])


def test_a_mistyped_study_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["bench_methods.py", *flags])
        runpy.run_path(str(ROOT / "eval/bench_methods.py"), run_name="__main__")

    def never(_: Work) -> None:
        raise AssertionError("it must be said before anything runs")

    monkeypatch.setattr("benching.images.work.Work.do_next", never)
    with pytest.raises(SystemExit, match="error: no study 'methdos': did you mean 'methods'"):
        run("methods", "methdos")
