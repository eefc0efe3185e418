"""Random prompt files: training, sampling and evaluation read the same list, or refuse it by file and row."""

import csv
import dataclasses
import io
import json
import random
import re

import datasets
import pytest

from am_diffusers.config.command_line import parse_config
from am_diffusers.prompts.sets import load_prompts, load_texts
from am_diffusers.run.prompts import load_lists

FILES = 60
SPECIAL = [
    *"\r\n\t\"',;\\#{}[]:\0",
    "\r\n",
    '""',
    '", "',
    "\u2028",
    "\x85",
    "\x0b",
    "\x1e",
    "\ufeff",
    "\u200d",
]
SPECIAL += ["\u0301", "\u202e", "\ufffe", "\U0001f98a", "\U0010ffff", "\\n", "\\ud83d", "null"]
PLANES = range(17)
CONFIG = """
pretrained_model_name_or_path: asset:tiny_sd3
output_dir: out
train_prompts: given by each file
rewards: [{name: jpeg_size}]
"""
# Faults of a row, of the header and of the whole file.
WHERE = r"row \d+, counted from 0|line \d+|no column|two columns|no prompt in it|it is UTF|carriage return"


def random_text(chance, avoid):
    """A text that is not blank, of characters of all planes, without what a format can't hold."""
    while True:
        parts = []
        for _ in range(chance.randrange(1, 12)):
            plane = chance.choice([0, 0, 0, *PLANES])
            other = chr(0x10000 * plane + chance.randrange(0x10000))
            parts.append(chance.choice([chance.choice(SPECIAL), other, chance.choice("ab fox")]))
        text = "".join(part for part in parts if not re.search(r"[\ud800-\udfff\0]", part))
        for character in avoid:
            text = text.replace(character, "")
        # What a file begins with may be a byte order mark.
        if text.strip() and not text.startswith("\ufeff"):
            return text


def as_txt(texts, end, chance):
    return end.join(texts) + chance.choice(["", end, 2 * end])


def as_tsv(texts, end, chance):
    return end.join(["id\tprompt", *(f"{row}\t{text}" for row, text in enumerate(texts))])


def as_csv(texts, end, chance):
    file = io.StringIO()
    quoting = chance.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    writer = csv.writer(file, lineterminator=end, quoting=quoting)
    writer.writerows([["id", "prompt"], *enumerate(texts)])
    return file.getvalue()


def as_json(texts, end, chance):
    rows = [chance.choice([text, {"prompt": text, "id": row}]) for row, text in enumerate(texts)]
    ascii_only, indent = chance.random() < 0.5, chance.choice([None, 1])
    return json.dumps(rows, ensure_ascii=ascii_only, indent=indent).replace("\n", end)


def as_jsonl(texts, end, chance):
    rows = [chance.choice([text, {"prompt": text, "id": row}]) for row, text in enumerate(texts)]
    return end.join(json.dumps(row, ensure_ascii=chance.random() < 0.5) for row in rows)


WRITERS = {"txt": as_txt, "tsv": as_tsv, "csv": as_csv, "json": as_json, "jsonl": as_jsonl}
AVOID = {"txt": "\n", "tsv": "\n\t"}


def is_ambiguous(suffix, texts, end):
    """Tell if a file may be refused: it looks quoted as in CSV, or as if carriage returns ended lines."""
    if suffix == "tsv":
        return any(re.fullmatch(r'".*"".*"', text, re.DOTALL) for text in texts)
    # Python's writer doesn't quote carriage returns where lines end by \n alone.
    many = {"txt": len(texts) > 1, "csv": end == "\r\n"}
    return any("\r" in text for text in texts) and not many.get(suffix, True)


def read_by_all(file, config):
    """What training, sampling and evaluation read, or their errors."""
    prompts = dataclasses.replace(config.prompts, train_prompts=str(file))
    training = dataclasses.replace(config, prompts=prompts)
    loads = (
        lambda: load_lists(training)[0],
        lambda: load_texts(str(file)),
        lambda: list(load_prompts(str(file)).prompts),
    )
    found = []
    for load in loads:
        try:
            found.append(load())
        except ValueError as error:
            found.append(error)
    return found


def check_refusal(error, file):
    message = str(error)
    assert str(file) in message
    assert re.search(WHERE, message), message
    assert len(message.split("\n")) == 1, message


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    return parse_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("suffix", [*WRITERS, "parquet"])
def test_whole_files_are_read_as_they_were_written(tmp_path, config, suffix):
    for seed in range(FILES):
        chance = random.Random(f"{suffix} {seed}")
        avoid = AVOID.get(suffix, "")
        texts = [random_text(chance, avoid) for _ in range(chance.randrange(1, 8))]
        file, end = tmp_path / f"p{seed}.{suffix}", chance.choice(["\n", "\r\n"])
        if suffix == "parquet":
            datasets.Dataset.from_dict({"prompt": texts}).to_parquet(file)
        else:
            mark = chance.choice([b"", b"\xef\xbb\xbf"])
            file.write_bytes(mark + WRITERS[suffix](texts, end, chance).encode())
        for read in read_by_all(file, config):
            if isinstance(read, ValueError) and is_ambiguous(suffix, texts, end):
                check_refusal(read, file)
            else:
                assert read == [text.strip() for text in texts], (seed, read)


def damage(content, chance):
    """Cut, changed or encoded anew: a file as it may come out of another program."""
    at = chance.randrange(len(content) + 1)
    insert = chance.choice([*SPECIAL, "\ud83d", ",", "\n"]).encode("utf-8", "surrogatepass")
    kinds = (
        lambda: content[:at],
        lambda: content[:at] + insert + content[at:],
        lambda: content[:at] + content[at + chance.randrange(1, 4) :],
        lambda: content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
        lambda: content.decode().encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"])),
    )
    return chance.choice(kinds)()


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_read_alike_or_refused_by_row(tmp_path, config, suffix):
    refused = 0
    for seed in range(2 * FILES):
        chance = random.Random(f"damaged {suffix} {seed}")
        texts = [random_text(chance, AVOID.get(suffix, "")) for _ in range(3)]
        content = WRITERS[suffix](texts, chance.choice(["\n", "\r\n"]), chance)
        file = tmp_path / f"p{seed}.{suffix}"
        file.write_bytes(damage(content.encode(), chance))
        training, sampling, evaluation = read_by_all(file, config)
        for error in (training, sampling, evaluation):
            if isinstance(error, ValueError):
                check_refusal(error, file)
        assert repr(training) == repr(sampling), seed
        # Evaluation finds a column of another usual name, which training has to be told.
        if not (isinstance(training, ValueError) and "no column 'prompt'" in str(training)):
            assert repr(training) == repr(evaluation), seed
        refused += isinstance(training, ValueError)
    assert 0 < refused < 2 * FILES
