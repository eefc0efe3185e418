"""Likeness to real pictures: composed, judged, kept beside the records, shown."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji import COLOUR_NAMES, COLOURS, PictureSet, background_of
from PIL import Image, PngImagePlugin

from am_diffusers.evaluation.statistics import Estimate
from am_diffusers.system.files import asset_path
from bench_records import P, curve, put, record, study
from benching.images.curves import make_curve
from benching.images.equal_reward import at_equal_reward
from benching.images.judging import Judge, judge_images
from benching.images.likeness import Judged, RunLikeness, likeness_file, read_likeness, write_likeness
from benching.images.page import likeness_of
from benching.images.records import record_file
from benching.images.study import Elsewhere
from benching.images.tables import equal_reward_table, likeness_table
from benching.images.work import Work
from evaluating.store import read_image

SCRIPT = Path(__file__).parents[2] / "scripts/assets/compose_pictures.py"
CAPTIONS = [
    "red apple, flat style, on a blue background",
    "pine tree, flat style, on a yellow background",
    "snowman, cartoon style, on a purple background",
    "umbrella, flat style, on a green background",
]


def compose(
    folder: Path, captions: list[str], images: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(captions))
    flags = ["--prompts", prompts, "--output_dir", folder, "--num_images_per_prompt", images, "--seed", seed]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


def spoilt(source: Path, folder: Path, amount: float) -> Path:
    """The pictures with a lattice of dark dots, as a fooled reward may like it."""
    folder.mkdir(parents=True)
    for file in sorted(source.glob("*.png")):
        with Image.open(file) as image:
            pixels, about = np.array(image, np.float32), PngImagePlugin.PngInfo()
            about.add_itxt("am_diffusers", image.info["am_diffusers"])
        pixels[::4, ::4] *= 1 - amount
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file.name, pnginfo=about)
    return folder


def test_composed_pictures_show_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = PictureSet(Path(asset_path("asset:pictures/pictures.parquet")))
    folder = compose(tmp_path / "real", CAPTIONS, 3, 0, monkeypatch)
    assert capsys.readouterr().out == f"12 pictures in {folder}\n"
    for prompt, caption in enumerate(CAPTIONS):
        pictures = torch.stack([read_image(folder / f"{prompt:05d}-{image:03d}.png") for image in range(3)])
        backgrounds = {COLOUR_NAMES[index] for index in background_of(pictures).tolist()}
        assert backgrounds == {caption.split()[-2]}
        assert (pictures[0] - pictures[1]).abs().max() > 0.1  # at other places
        # The drawing of this concept and style, up to its place: as much of each colour.
        concept, style = re.fullmatch(r"(.*), (\w+) style.*", caption).groups()
        drawing = bank.bank[bank.concepts.index(concept), bank.styles.index(style)]
        colour = drawing[:3].sum(dim=(1, 2)) / drawing[3].sum()
        background = COLOURS[COLOUR_NAMES.index(caption.split()[-2])]
        covered = (pictures - background[None, :, None, None]).mean(dim=(0, 2, 3))
        direction = torch.nn.functional.cosine_similarity(covered, colour - background, dim=0)
        assert direction > 0.97


def test_what_cannot_be_composed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"'red aple.* \(prompt 2\) is no caption .*'red apple, flat style"):
        compose(tmp_path / "a", [CAPTIONS[1], CAPTIONS[0].replace("apple", "aple")], 1, 0, monkeypatch)
    with pytest.raises(SystemExit, match="num_images_per_prompt 0: expected at least 1"):
        compose(tmp_path / "a", CAPTIONS, 0, 0, monkeypatch)
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/00000-000.png").touch()
    with pytest.raises(SystemExit, match="full is not empty"):
        compose(tmp_path / "full", CAPTIONS, 1, 0, monkeypatch)


def test_real_pictures_are_liker_and_spoilt_ones_less_like_than_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compose(tmp_path / "real", CAPTIONS, 4, 0, monkeypatch)
    clean = compose(tmp_path / "clean", CAPTIONS, 2, 1, monkeypatch)
    base, worse = spoilt(clean, tmp_path / "base", 0.5), spoilt(clean, tmp_path / "worse", 1)
    judge = Judge(real, base)
    assert judge.base.gain.value == 0
    assert judge.base.by_prompt == [0] * 4
    better, below = judge.judge(clean), judge.judge(worse)
    for found in (better, judge.real):
        assert found.gain.value > 0.5
        assert found.frechet < judge.base.frechet
        assert np.mean(found.by_prompt) == pytest.approx(found.gain.value)
    assert below.gain.value < -0.3
    assert below.frechet > judge.base.frechet

    # By its definition, one picture by hand.
    def features(file: Path) -> torch.Tensor:
        return judge._network.image_features(read_image(file)[None])[0]

    generated = [features(folder / "00002-001.png") for folder in (base, clean)]
    own = torch.stack([features(real / f"00002-{image:03d}.png") for image in range(2)])
    expected = [torch.cosine_similarity(each[None], own).mean().item() for each in generated]
    found = [judge._likeness(judge._features(folder))[2, 1] for folder in (base, clean)]
    assert found == pytest.approx(expected, rel=1e-5)
    # Those that judge aren't judged: the other half is.
    others = torch.stack([features(real / f"00002-{image:03d}.png") for image in (2, 3)])
    of_others = torch.cosine_similarity(others[:, None], own[None], dim=-1).mean().item()
    base_scores = judge._likeness(judge._features(base))
    expected_gain = (of_others - base_scores[2].mean()) / base_scores.std(ddof=1)
    assert judge.real.by_prompt[2] == pytest.approx(expected_gain, rel=1e-3)
    with pytest.raises(ValueError, match="at least 8 images of each of 4 prompts, found 4 of 4"):
        Judge(real, real)
    mixed = compose(tmp_path / "mixed", [*CAPTIONS[1:], CAPTIONS[0]], 4, 0, monkeypatch)
    with pytest.raises(ValueError, match=r"mixed: expected images of 'red apple, .* found 'pine tree, "):
        Judge(mixed, base)
    with pytest.raises(ValueError, match=r"real: \(4, 4\) images, the base has \(4, 2\)"):
        judge.judge(real)
    (real / "00003-003.png").unlink()
    with pytest.raises(ValueError, match="equally many of each prompt"):
        Judge(real, base)
    (real / "00003-002.png").unlink()
    Image.new("RGB", (64, 64)).save(real / "00003-002.png")
    Image.new("RGB", (32, 32)).save(real / "00003-003.png")
    with pytest.raises(ValueError, match="real: images of different sizes"):
        Judge(real, base)
    Image.new("RGB", (64, 64)).save(real / "00003-003.png")
    with pytest.raises(ValueError, match=r"00003-002.png: no text .*compose_pictures"):
        Judge(real, base)


def test_runs_are_judged_once_while_their_pictures_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compose(tmp_path / "real", CAPTIONS, 2, 0, monkeypatch)
    clean = compose(tmp_path / "clean", CAPTIONS, 1, 1, monkeypatch)
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path / "data", tmp_path)
    for setting in ("a", "b"):
        put(work, setting, (0.8, 0.4))
    spoilt(clean, work.base_images, 0.5)
    spoilt(clean, work.images("a", 0, "10-s"), 0)
    missing = f"not judged, its images aren't in {tmp_path}"
    assert list(judge_images(work, real)) == [f"a-seed0: {missing}", f"b-seed0: {missing}"]
    spoilt(clean, work.images("a", 0, "20-s"), 1)  # before, one mark of two was there
    assert list(judge_images(work, real)) == ["a-seed0: judged", f"b-seed0: {missing}"]
    assert list(judge_images(work, real)) == ["a-seed0: judged before", f"b-seed0: {missing}"]
    found = work.likeness("a", 0)
    assert found is not None
    assert found.marks["10-s"].gain.value > 0 > found.marks["20-s"].gain.value
    assert work.likeness("b", 0) is None
    other = compose(tmp_path / "other", CAPTIONS, 2, 2, monkeypatch)
    for mark in ("10-s", "20-s"):
        spoilt(clean, work.images("b", 0, mark), 0)
    assert list(judge_images(work, other)) == ["a-seed0: judged", "b-seed0: judged"]
    assert likeness_of(work) == work.likeness("a", 0)
    file = likeness_file(record_file(work.data, "b", 0))
    write_likeness(dataclasses.replace(work.likeness("b", 0), judge={"real": "others"}), file)
    with pytest.raises(ValueError, match="a-seed0 and b-seed0 were judged by different judges"):
        likeness_of(work)
    file.unlink()
    reference = Elsewhere("discretisation", "published-k40")  # judged by the real pictures of the page
    elsewhere = dataclasses.replace(work, study=dataclasses.replace(work.study, reference=reference))
    with pytest.raises(ValueError, match="a-seed0 and published-k40-seed0 were judged by different judges"):
        likeness_of(elsewhere)
    likeness_file(record_file(work.data, "a", 0)).write_text("{")
    with pytest.raises(ValueError, match=r"a-seed0.json can't be read: remove it"):
        list(judge_images(work, other))


def judged(gain: float, marks: dict[str, float]) -> RunLikeness:
    def each(value: float) -> Judged:
        return Judged(Estimate(value, value - 0.1, value + 0.1), [value] * P, 100 - 10 * value)

    at = {mark: each(value) for mark, value in marks.items()}
    return RunLikeness({"real": "r"}, each(0), each(gain), at)


def test_tables_show_the_likeness_that_is_known(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    ours, theirs = record(work, "a", (0.8, 0.4)), record(work, "b", (0.8, 0.4))
    file = likeness_file(tmp_path / "b-seed0.json")
    write_likeness(judged(5, {"10-s": -1, "20-s": -2}), file)
    kept = read_likeness(file)
    both = [make_curve([ours], [judged(5, {"10-s": 0.5, "20-s": 0.5})]), make_curve([theirs], [kept])]
    place = both[0].at("20-s")
    assert (place.held_out, place.likeness, place.real_frechet) == pytest.approx((0.4, 0.5, 95))
    assert both[0].at("base").real_frechet == 100
    assert likeness_table(both, work.study, judged(5, {})).splitlines()[2:] == [
        "| *other real images* | - | - | - | +5.00 [+4.90, +5.10] | 50.0 |",
        "| *base* | - | - | - | +0.00 | 100.0 |",
        "| a | +0.40 | +0.50 [+0.50, +0.50] | +0.80 | +0.50 [+0.50, +0.50] | 95.0 |",
        "| b | +0.40 | -1.00 [-1.00, -1.00] | +0.80 | -2.00 [-2.00, -2.00] | 120.0 |",
    ]
    found = at_equal_reward(*both)
    assert found is not None
    # At nine tenths: between -1 and -2, and at .5.
    assert found.likeness.value == pytest.approx(-1.8 - 0.5)
    assert "| -2.30 [-2.3" in equal_reward_table(both[0], both[1:], timed=True)
    unknown = curve(work, "b", (0.8, 0.4))
    assert np.isnan(unknown.at("20-s").likeness)
    assert "| +0.00 [+0.00, +0.00] | - |" in equal_reward_table(both[0], [unknown], timed=True)
    # Known of one run of two: not shown.
    partly = make_curve([theirs, dataclasses.replace(theirs, seed=1)], [kept, None])
    assert "likeness" not in partly.gains


def test_a_run_that_is_done_again_loses_the_likeness_of_its_old_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path / "data", tmp_path)
    file = likeness_file(record_file(work.data, "a", 0))
    write_likeness(judged(5, {}), file)
    monkeypatch.setattr("benching.images.work.train", lambda *_: [])
    monkeypatch.setattr("benching.images.work.measure", lambda *_: [])
    work._do("a", 0, tmp_path / "run")
    assert work.record("a", 0) is not None
    assert not file.exists()
