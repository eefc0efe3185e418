"""summary.json: what it says of made-up results, and that it survives the way to the disk and back."""

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
from safetensors import SafetensorError

from am_diffusers.evaluation.statistics import compare, diversity
from am_diffusers.prompts.sets import PromptSet
from am_diffusers.system import files
from am_diffusers.system.files import StorageError, write_text, write_whole
from evaluating.summary.frechet import frechet_distance, frechet_from_base
from evaluating.summary.summarising import summarise
from evaluating.summary.summary import read_summary, write_summary
from evaluation_results import BASE_20, SETTINGS, STRONG, WEAK, make_results

RESULTS = make_results()


@pytest.fixture(scope="module")
def summary():
    return summarise(RESULTS)


def candidate(summary, which):
    return next(each for each in summary.candidates if each.key == which.key)


def against_base(summary, which=STRONG):
    against = candidate(summary, which).against_base
    assert against is not None
    return against


def test_every_reward_is_compared_with_the_base_also_by_category(summary):
    base, tuned = (RESULTS.scores[each.key]["pickscore"] for each in (BASE_20, STRONG))
    result = against_base(summary).rewards["pickscore"]
    assert result.overall == compare(base, tuned)
    rows = list(range(1, 24, 3))
    assert result.categories["kind"]["thing"] == compare(base[rows], tuned[rows], unit=result.overall.base_sd)
    assert list(result.categories["kind"]) == ["animal", "thing"]
    assert summary.categories == {"kind": {"animal": 8, "thing": 8}}
    assert result.overall.significant
    assert not against_base(summary).rewards["hpsv2"].overall.significant


def test_candidates_have_means_with_intervals_and_a_base_has_no_comparison(summary):
    for which in (BASE_20, WEAK, STRONG):
        found = candidate(summary, which)
        mean = found.scores["pickscore"]
        assert mean.value == pytest.approx(RESULTS.scores[which.key]["pickscore"].mean())
        assert mean.low < mean.value < mean.high
        assert (found.lora, found.lora_scale) == (which.lora and str(which.lora), which.lora_scale)
    assert candidate(summary, BASE_20).against_base is None
    assert summary.base_of(candidate(summary, STRONG)) == candidate(summary, BASE_20)


def test_diversity_is_that_of_the_trainers_evaluation(summary):
    features = [RESULTS.features[each.key]["clip"] for each in (BASE_20, STRONG)]
    expected = diversity("clip", *features)
    kept = against_base(summary).diversity_kept["clip"]
    assert kept == expected.kept
    assert candidate(summary, BASE_20).diversity["clip"].value == pytest.approx(expected.base)
    assert candidate(summary, STRONG).diversity["clip"].value == pytest.approx(expected.tuned)


def test_frechet_distances_path_kl_and_change():
    reference = np.random.default_rng(1).normal(size=(30, 6))
    change = np.random.default_rng(2).uniform(size=(24, 4))
    results = replace(RESULTS, reference_features={"clip": reference}, changes={WEAK.key: change})
    summary = summarise(results, resamples=99)
    base, tuned = (RESULTS.features[each.key]["clip"] for each in (BASE_20, WEAK))
    assert against_base(summary, WEAK).frechet["clip"] == frechet_from_base(base, tuned)
    for which, features in ((BASE_20, base), (WEAK, tuned)):
        expected = frechet_distance(features.reshape(-1, 6), reference)
        assert candidate(summary, which).reference["clip"] == expected
    path_kl, found = against_base(summary, WEAK).path_kl, against_base(summary, WEAK).change
    assert path_kl is not None
    assert [path_kl.low, path_kl.value, path_kl.high] == pytest.approx([0.9] * 3)
    assert found is not None
    assert found.value == pytest.approx(change.mean())
    assert against_base(summary, STRONG).change is None


def test_each_tuned_model_is_compared_with_the_base_of_its_steps():
    few = {each: replace(each, num_inference_steps=4) for each in (BASE_20, STRONG)}
    scores = RESULTS.scores | {each.key: RESULTS.scores[old.key] for old, each in few.items()}
    worse = {name: table - 0.5 for name, table in scores[few[BASE_20].key].items()}
    results = replace(
        RESULTS,
        candidates=(BASE_20, few[BASE_20], STRONG, few[STRONG]),
        scores=scores | {few[BASE_20].key: worse},
        features={},
        path_kl={},
    )
    summary = summarise(results, resamples=99)
    gains = [against_base(summary, each).rewards["pickscore"].overall for each in (STRONG, few[STRONG])]
    assert gains[1].difference.value == pytest.approx(gains[0].difference.value + 0.5)
    assert against_base(summary, few[STRONG]).base == few[BASE_20].key
    assert against_base(summary, few[STRONG]).diversity_kept == {}


def test_one_prompt_and_one_picture_have_values_without_intervals(tmp_path):
    one = make_results(num_prompts=1, images=1)
    summary = summarise(one)
    result = against_base(summary).rewards["pickscore"].overall
    assert (result.difference.low, result.gain, result.base_sd) == (None, None, None)
    assert against_base(summary).diversity_kept == {}
    assert against_base(summary).frechet == {}
    write_summary(summary, tmp_path / "summary.json")
    assert read_summary(tmp_path / "summary.json") == summary


def test_constant_scores_and_pictures_all_alike_break_nothing(tmp_path):
    scores = {key: {"ones": np.ones((24, 4))} for key in RESULTS.scores}
    features = {key: {"clip": np.full((24, 4, 6), 0.3)} for key in RESULTS.scores}
    summary = summarise(replace(RESULTS, scores=scores, features=features), resamples=99)
    result = against_base(summary).rewards["ones"]
    assert (result.overall.gain, result.overall.p_value) == (None, 1)
    assert result.categories["kind"]["thing"].gain is None
    assert against_base(summary).diversity_kept == {}
    write_summary(summary, tmp_path / "summary.json")


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (
            {"scores": RESULTS.scores | {WEAK.key: {"ocr": np.full((24, 4), np.nan)}}},
            "ocr of lora",
        ),
        ({"features": {BASE_20.key: {"clip": np.full((24, 4, 2), np.inf)}}}, "clip of base"),
        ({"path_kl": {WEAK.key: np.full((24, 4), np.inf)}}, "path KL of lora"),
        ({"scores": {each: {} for each in RESULTS.scores}}, "no scores"),
    ],
)
def test_numbers_that_are_none_are_an_error_that_names_them(measure, message):
    with pytest.raises(ValueError, match=message):
        summarise(replace(RESULTS, **measure))


def test_file_is_the_same_again_and_reads_back(summary, tmp_path):
    files = [tmp_path / name for name in ("one.json", "two.json")]
    write_summary(summary, files[0])
    write_summary(summarise(make_results()), files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_summary(files[0]) == summary
    assert sorted(tmp_path.iterdir()) == files


def test_fingerprint_is_of_prompts_settings_and_number_of_pictures(summary):
    prompts = RESULTS.prompts.prompts
    others = [
        make_results(settings=SETTINGS | {"seed": 1}),
        make_results(images=3),
        make_results(prompts=PromptSet((*prompts[:-1], "another"))),
        make_results(prompts=PromptSet(prompts[::-1])),
    ]
    fingerprints = [summarise(results, resamples=9).fingerprint for results in others]
    assert len({summary.fingerprint, *fingerprints}) == 5
    assert summarise(make_results(seed=3), resamples=9).fingerprint == summary.fingerprint


def test_secrets_in_settings_are_redacted(summary, tmp_path):
    settings = {**SETTINGS, "pretrained_model_name_or_path": "https://me:hunter2secret@host/model"}
    write_summary(replace(summary, settings=settings), tmp_path / "summary.json")
    assert "hunter2secret" not in (tmp_path / "summary.json").read_text()


def broken(summary, tmp_path, change):
    file = tmp_path / "summary.json"
    write_summary(summary, file)
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("candidates"), "candidates: Field required"),
        (lambda d: d.update(format=1), "format"),
        (lambda d: d["candidates"][1]["scores"]["hpsv2"].update(value="much"), "scores.hpsv2.value"),
        (lambda d: d["candidates"][1]["scores"]["hpsv2"].update(value=float("nan")), "NaN"),
        (lambda d: d["candidates"].pop(0), "not there"),
    ],
)
def test_file_that_is_no_summary_is_an_error_that_says_where(summary, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_summary(broken(summary, tmp_path, change))


def test_file_cut_short_or_missing_is_an_error_that_names_it(summary, tmp_path):
    file = broken(summary, tmp_path, lambda document: None)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"summary\.json can't be read"):
        read_summary(file)
    with pytest.raises(ValueError, match=r"none\.json can't be read"):
        read_summary(tmp_path / "none.json")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "folder/text.txt"
    write_text(file, "first\n")
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRUSR

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(StorageError, match="no space left on the disk: free some and run the same command"):
        write_text(file, "second\n")
    assert file.read_text() == "first\n"
    assert os.listdir(file.parent) == ["text.txt"]


def test_full_disk_that_safetensors_wraps_is_called_that(tmp_path):
    def full(part):
        part.write_bytes(b"some of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match=r"values\.safetensors: no space left"):
        write_whole(tmp_path / "values.safetensors", full)
    assert os.listdir(tmp_path) == []
