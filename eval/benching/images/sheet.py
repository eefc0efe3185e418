"""Sheet of the images of all methods from the same noise: a row per setting, a column per prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from am_diffusers.evaluation.grids import shorten
from am_diffusers.system.files import write_whole
from benching.images.work import Work
from evaluating.candidates import BASE

PROMPTS = 10
CELL, NAME, TEXT, GAP, LINE = 112, 190, 15, 4, 20


def images_of(work: Work, settings: Sequence[str]) -> dict[str, list[Path]]:
    """Return images of the first seed at the budget, the base's first, the same prompts and noise for all.

    Settings whose images aren't on this disk are left out: images aren't kept with the records.
    """
    seed, mark = work.study.seeds[0], work.study.budget
    folders = {setting: work.images(setting, seed, mark) for setting in settings}
    folders = {BASE: work.base_images} | folders
    found = {shown: sorted(folder.glob("[!.]*-000.png")) for shown, folder in folders.items()}
    complete = {shown: files for shown, files in found.items() if len(files) >= PROMPTS}
    return {
        shown: [files[i * len(files) // PROMPTS] for i in range(PROMPTS)] for shown, files in complete.items()
    }


def draw_sheet(images: Mapping[str, Sequence[Path]], prompts: Sequence[str], file: Path) -> None:
    """Draw the sheet as PNG.

    Args:
        images: image files by the name of their row.
        prompts: prompts of the columns.
        file: file to write.
    """
    font = ImageFont.load_default(size=TEXT)
    top = 4 * LINE
    size = (NAME + len(prompts) * (CELL + GAP), top + len(images) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        for place, line in enumerate(_lines(prompt, font)):
            pen.text((NAME + column * (CELL + GAP), place * LINE), line, fill="black", font=font)
    for row, (name, files) in enumerate(images.items()):
        upper = top + row * (CELL + GAP)
        pen.text((0, upper + CELL // 2 - TEXT), shorten(name, font, NAME - GAP), fill="black", font=font)
        for column, image in enumerate(files):
            with Image.open(image) as opened:
                cell = ImageOps.contain(opened.convert("RGB"), (CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (NAME + column * (CELL + GAP), upper))
    write_whole(file, lambda part: sheet.save(part, format="PNG"))


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Wrap a text into at most four lines that fit a column."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shorten(line, font, CELL) for line in lines[:4]]
