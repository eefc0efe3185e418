"""Layouts read as the judges read them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from am_diffusers.prompts.sets import PromptSet
from evaluating import layouts
from evaluating.layouts import STYLES, export_layout

ROWS = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1, "color": None, "position": None},
            {"class": "dog", "count": 1, "color": None, "position": ["left of", 0]},
        ],
        "exclude": None,
        "prompt": "a photo of a dog left of a cat",
    },
)
GENEVAL = PromptSet(tuple(str(row["prompt"]) for row in ROWS), rows=ROWS)


def draw(folder: Path, num_prompts: int, images_per_prompt: int) -> list[list[Path]]:
    """Pictures of one colour each, which tells them apart."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [[folder / f"{p:05d}-{i:03d}.png" for i in range(images_per_prompt)] for p in range(num_prompts)]
    for p, row in enumerate(files):
        for i, file in enumerate(row):
            Image.new("RGB", (8, 8), (20 * p, 60 * i, 100)).save(file)
    return files


def hpsv2(monkeypatch: pytest.MonkeyPatch, a_style: int = 2) -> PromptSet:
    """A benchmark of a few prompts a style, the styles in turn."""
    monkeypatch.setattr(layouts, "PROMPTS_A_STYLE", a_style)
    styles = STYLES * a_style
    prompts = tuple(f"prompt {i}" for i in range(len(styles)))
    return PromptSet(prompts, {"source": ("web",) * len(styles), "style": styles})


def snapshot(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    return {
        file: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def colour(file: Path) -> list[int]:
    with Image.open(file) as image:
        return np.asarray(image)[0, 0].tolist()


def test_geneval_reads_pictures_and_demands(tmp_path: Path) -> None:
    files = draw(tmp_path / "in", 2, 3)
    export_layout("geneval", tmp_path / "out", GENEVAL, files)
    seen = {}
    # As evaluate_images.py goes through the folder.
    for subfolder in os.listdir(tmp_path / "out"):
        assert subfolder.isdigit()
        with (tmp_path / "out" / subfolder / "metadata.jsonl").open() as file:
            metadata = json.load(file)
        for name in os.listdir(tmp_path / "out" / subfolder / "samples"):
            assert re.match(r"\d+\.png", name)
            seen[metadata["prompt"], name] = tmp_path / "out" / subfolder / "samples" / name
        for demand in metadata["include"]:
            assert demand.keys() <= {"class", "count", "position"}, "None would be a demand for a colour"
            assert demand.get("position", ["left of", 0]) == ["left of", 0]
        assert "exclude" not in metadata
        assert metadata["tag"] in {"single_object", "position"}
    names = ["0000.png", "0001.png", "0002.png"]
    assert sorted(seen) == sorted((prompt, name) for prompt in GENEVAL.prompts for name in names)
    for p, prompt in enumerate(GENEVAL.prompts):
        for i, name in enumerate(names):
            assert seen[prompt, name].samefile(files[p][i])


def test_hpsv2_reads_the_pictures_of_a_style_by_their_number_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = draw(tmp_path / "in", 8, 1)
    export_layout("hpsv2", tmp_path / "out", hpsv2(monkeypatch), files)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(STYLES), "the judge takes every entry for a style"
    for place, style in enumerate(STYLES):
        for index in range(2):
            file = tmp_path / "out" / style / f"{index:05d}.jpg"
            assert colour(file) == pytest.approx(colour(files[4 * index + place][0]), abs=3)
            with Image.open(file) as image:
                assert (image.format, image.size) == ("JPEG", (8, 8))
        assert len(os.listdir(tmp_path / "out" / style)) == 2


@pytest.mark.parametrize("layout", ["geneval", "hpsv2"])
def test_again_changes_nothing_but_what_changed(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = GENEVAL if layout == "geneval" else hpsv2(monkeypatch)
    files = draw(tmp_path / "in", len(prompts), 1)
    export_layout(layout, tmp_path / "out", prompts, files)
    first = snapshot(tmp_path / "out")
    export_layout(layout, tmp_path / "out", prompts, files)
    assert snapshot(tmp_path / "out") == first
    # A picture made again is another file under the same name.
    Image.new("RGB", (8, 8), "red").save(tmp_path / "again.png")
    os.replace(tmp_path / "again.png", files[1][0])
    (tmp_path / "out" / ".left-by-a-kill.part").write_bytes(b"")
    export_layout(layout, tmp_path / "out", prompts, files)
    second = snapshot(tmp_path / "out")
    changed = [file for file in first if second[file] != first[file]]
    expected = "00001/samples/0000.png" if layout == "geneval" else "concept-art/00000.jpg"
    assert [str(file.relative_to(tmp_path / "out")) for file in changed] == [expected]
    assert colour(changed[0]) == pytest.approx([255, 0, 0], abs=3)


def test_pictures_are_copied_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    files = draw(tmp_path / "in", 2, 1)
    export_layout("geneval", tmp_path / "out", GENEVAL, files)
    copy = tmp_path / "out" / "00001" / "samples" / "0000.png"
    assert copy.read_bytes() == files[1][0].read_bytes()
    assert not copy.samefile(files[1][0])


@pytest.mark.parametrize(
    ("layout", "prompts", "message"),
    [
        ("coco", GENEVAL, "unknown layout 'coco': expected one of geneval, hpsv2"),
        ("geneval", PromptSet(("one", "two")), r"prompt 0 \('one'\) lacks one of tag, include, prompt"),
        (
            "geneval",
            PromptSet(("one", "two"), rows=ROWS),
            "prompt 0 is 'one', its row says 'a photo of a bench'",
        ),
        (
            "geneval",
            PromptSet(GENEVAL.prompts, rows=({**ROWS[0], "include": [{"class": "cat"}]}, ROWS[1])),
            "without class or count: read the prompts from GenEval's evaluation_metadata.jsonl",
        ),
        ("geneval", PromptSet(("one",)), "images of 2 prompts for 1 prompts"),
        ("hpsv2", GENEVAL, "800 prompts of each of the styles anime, concept-art, paintings, photo"),
        (
            "hpsv2",
            PromptSet(("one", "two"), {"style": ("anime", "photo")}),
            r"categories {'style': {'anime': 1, 'photo': 1}}: evaluate on the whole HPDv2 benchmark",
        ),
    ],
)
def test_unfit_prompts_are_refused_before_anything_is_written(
    layout: str, prompts: PromptSet, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_layout(layout, tmp_path / "out", prompts, draw(tmp_path / "in", 2, 1))
    assert not (tmp_path / "out").exists()


def test_unfit_pictures_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="one image per prompt: evaluate with --num_images_per_prompt 1"):
        export_layout("hpsv2", out, hpsv2(monkeypatch), draw(tmp_path / "in", 8, 2))
    few = hpsv2(monkeypatch, 2)
    monkeypatch.setattr(layouts, "PROMPTS_A_STYLE", 3)
    with pytest.raises(ValueError, match=r"3 prompts of each of the styles .* 'photo': 2"):
        export_layout("hpsv2", out, few, draw(tmp_path / "in", 8, 1))
    files = draw(tmp_path / "in", 2, 2)
    files[1][1].unlink()
    with pytest.raises(ValueError, match=r"1 images are missing, the first is .*00001-001.png"):
        export_layout("geneval", out, GENEVAL, files)
    assert not out.exists()


def test_files_of_something_else_are_not_left_for_the_judge(tmp_path: Path) -> None:
    out, files = tmp_path / "out", draw(tmp_path / "in", 2, 3)
    export_layout("geneval", out, GENEVAL, files)
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"samples/0002.png is no part of this layout"):
        export_layout("geneval", out, GENEVAL, [row[:2] for row in files])
    assert snapshot(out) == before
