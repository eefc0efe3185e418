"""Finished images in the folder layouts that official judges read.

    geneval   00012/metadata.jsonl, 00012/samples/0003.png   evaluation/evaluate_images.py of GenEval
    hpsv2     anime/00012.jpg and three more styles          hpsv2.evaluate of the package hpsv2

Images are hard links where the format allows, else copies. Everything is checked before anything is
written; written again, nothing changes.
"""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from am_diffusers.prompts.sets import PromptSet
from am_diffusers.system.files import write_whole

# Styles and prompts of each in the benchmark of HPSv2 (arXiv 2306.09341): the judge goes through 800 files.
STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS_A_STYLE = 800
Plan = dict[Path, Callable[[Path], object]]
"""Functions that write a file at a given place, by path inside the layout."""


def export_layout(layout: str, folder: Path, prompts: PromptSet, images: Sequence[Sequence[Path]]) -> None:
    """Lay out the images of one candidate for a judge.

    Args:
        layout: one of `LAYOUTS`.
        folder: folder of the layout and nothing else; made if needed.
        prompts: P prompts. For geneval with `rows` as in its evaluation_metadata.jsonl; for hpsv2 the whole
            benchmark, each style in the order of its file, with a category column of styles.
        images: (P, S) image files, 8-bit RGB PNG; for hpsv2 S is 1.

    Raises:
        ValueError: if an image is missing, the prompts aren't the judge's, or other files are in the folder.
        StorageError: if it can't be written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if len(images) != len(prompts):
        raise ValueError(f"{layout}: images of {len(images)} prompts for {len(prompts)} prompts")
    missing = [file for row in images for file in row if not file.is_file()]
    if missing:
        raise ValueError(
            f"{layout}: {len(missing)} images are missing, the first is {missing[0]}: finish the evaluation"
        )
    plan = LAYOUTS[layout](prompts, images)
    others = [file for file in _files(folder) if file.relative_to(folder) not in plan]
    if others:
        raise ValueError(
            f"{layout}: {others[0]} is no part of this layout, and the judge might read it: remove it, or "
            "choose another folder"
        )
    for place, write in plan.items():
        write(folder / place)


def check_layout(layout: str, prompts: PromptSet, images_per_prompt: int) -> None:
    """Raise ValueError if the judge couldn't use these prompts, before any image is made."""
    LAYOUTS[layout](prompts, [[Path("picture.png")] * images_per_prompt] * len(prompts))


def _geneval(prompts: PromptSet, images: Sequence[Sequence[Path]]) -> Plan:
    """Lay out what evaluate_images.py reads: the prompt's line of metadata, and `samples` in any number."""
    plan: Plan = {}
    rows = prompts.rows or ({},) * len(prompts)
    for index, (prompt, row, files) in enumerate(zip(prompts.prompts, rows, images, strict=True)):
        metadata = _without_none(row)
        _check_metadata(index, prompt, metadata)
        place, line = Path(f"{index:05d}"), json.dumps(metadata) + "\n"
        plan[place / "metadata.jsonl"] = partial(_write, data=line.encode())
        for image, file in enumerate(files):
            plan[place / "samples" / f"{image:04d}.png"] = partial(_link, source=file)
    return plan


def _without_none(value: object) -> object:
    """Remove the keys that tables fill with None: to the judge a key is a demand, whatever its value."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, (list, tuple)) else value


def _check_metadata(index: int, prompt: str, metadata: object) -> None:
    remedy = "read the prompts from GenEval's evaluation_metadata.jsonl"
    keys = ("tag", "include", "prompt")
    if not isinstance(metadata, dict) or any(key not in metadata for key in keys):
        raise ValueError(f"geneval: prompt {index} ({prompt!r}) lacks one of {', '.join(keys)}: {remedy}")
    objects = [*metadata["include"], *metadata.get("exclude", [])]
    if not all(isinstance(part, dict) and {"class", "count"} <= part.keys() for part in objects):
        raise ValueError(
            f"geneval: prompt {index} ({prompt!r}) has an object without class or count: {remedy}"
        )
    if str(metadata["prompt"]).strip() != prompt:
        raise ValueError(
            f"geneval: prompt {index} is {prompt!r}, its row says {metadata['prompt']!r}: {remedy}"
        )


def _hpsv2(prompts: PromptSet, images: Sequence[Sequence[Path]]) -> Plan:
    """Lay out what hpsv2.evaluate reads: every folder is a style, its images numbered like its prompts."""
    if any(len(files) != 1 for files in images):
        raise ValueError(
            "hpsv2: its judge takes one image per prompt: evaluate with --num_images_per_prompt 1"
        )
    columns = [column for column in prompts.categories.values() if set(column) == set(STYLES)]
    if not columns or set(Counter(columns[0]).values()) != {PROMPTS_A_STYLE}:
        counts = {name: dict(Counter(column)) for name, column in prompts.categories.items()}
        raise ValueError(
            f"hpsv2: its judge goes through {PROMPTS_A_STYLE} prompts of each of the styles "
            f"{', '.join(STYLES)}; the prompts have the categories {str(counts)[:300]}: evaluate on the "
            "whole HPDv2 benchmark"
        )
    plan: Plan = {}
    seen: Counter[str] = Counter()
    for style, (file,) in zip(columns[0], images, strict=True):
        plan[Path(style) / f"{seen[style]:05d}.jpg"] = partial(_convert, source=file)
        seen[style] += 1
    return plan


LAYOUTS: dict[str, Callable[[PromptSet, Sequence[Sequence[Path]]], Plan]] = {
    "geneval": _geneval,
    "hpsv2": _hpsv2,
}


def _files(folder: Path) -> Iterator[Path]:
    """Yield files in a folder, without hidden ones: those are parts that a killed export left."""
    return (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def _link(file: Path, source: Path) -> None:
    if file.exists() and file.samefile(source):
        return

    def link_or_copy(part: Path) -> None:
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, part)

    write_whole(file, link_or_copy)


def _convert(file: Path, source: Path) -> None:
    """Write a JPEG with PIL's defaults, as the judge's own example does."""
    buffer = io.BytesIO()
    with Image.open(source) as image:
        image.save(buffer, format="JPEG")
    _write(file, buffer.getvalue())


def _write(file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        write_whole(file, lambda part: part.write_bytes(data))
