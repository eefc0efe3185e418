"""Prompt files that were misread without a word: read as they stand, or refused with file and row."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from am_diffusers.prompts.sets import load_prompts, load_texts

HALF = '"a fox \\ud83d"'
CSV = "id,prompt\n0,a fox\n1,a red fox, sitting on a mat, 3d style\n"
TSV = '"HELLO" written on a sign\tText\nthe saying "BE"\tText\n\'n\', ok\t"Note"\n'
QUOTED = ('"HELLO" written on a sign', 'the saying "BE"', "'n', ok")


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return str(path)


def check_refused(source, message):
    """Training (and sampling) refuse a source as evaluation does, in one line with its name."""
    for load in (load_prompts, load_texts):
        with pytest.raises(ValueError, match=message) as caught:
            load(source)
        assert source in str(caught.value)
        assert "\n" not in str(caught.value)


def test_tab_separated_prompts_keep_their_quotes(tmp_path):
    file = write(tmp_path / "p.tsv", "prompt\tcategory\r\n" + TSV)
    assert load_prompts(file).prompts == QUOTED == tuple(load_texts(file))
    assert load_prompts(file).categories == {"category": ("Text", "Text", '"Note"')}
    write(tmp_path / "folder/train.tsv", "prompt\tcategory\n" + TSV)
    assert load_prompts(str(tmp_path / "folder")).prompts == QUOTED


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_two_line_ends_end_a_line(tmp_path, end):
    odd = [f"a{mark}b" for mark in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    assert load_texts(write(tmp_path / "p.txt", end.join([*odd, "c"]) + end)) == [*odd, "c"]
    assert load_texts(write(tmp_path / "p.tsv", end.join(["prompt", *odd]))) == odd
    texts = [json.dumps(text, ensure_ascii=False) for text in odd]
    assert load_texts(write(tmp_path / "p.jsonl", end.join(texts))) == odd
    unquoted = odd[:-1]  # csv takes a lone carriage return for a line end where nothing quotes it
    assert load_texts(write(tmp_path / "p.csv", end.join(["prompt", *unquoted, f'"{odd[-1]}"']))) == odd
    write(tmp_path / "folder/train.txt", end.join(odd))
    assert load_prompts(str(tmp_path / "folder")).prompts == tuple(odd)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", CSV, r"row 1, counted from 0 \(line 3\): 4 cells, the header has 2: quote texts that hold"),
        ("p.csv", "prompt\n\na fox, red\n", r"row 0, counted from 0 \(line 3\): 2 cells, the header has 1"),
        ("p.csv", "prompt,tag\na fox\n", r"row 0, .*: 1 cells, the header has 2"),
        ("p.csv", 'prompt,tag\n"HELLO" on a sign,t\n', r"row 0, counted from 0 \(line 2\): '.*' expected"),
        ("p.csv", 'prompt\na\n"b\nc\nd\n', r"row 1, .*: unexpected end of data"),
        ("p.csv", "prompt\ra\rb\r", "a carriage return alone is no line end"),
        ("p.csv", "prompt\na\rb\n", r"row 0, .*: a carriage return alone is no line end"),
        ("p.csv", "prompt\n" + 150_000 * "x", r"row 0, .*: field larger than"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns are named 'prompt'"),
        ("p.tsv", "prompt\ttag\na\tb\tc\n", r"row 0, counted from 0 \(line 2\): 3 cells, the header has 2"),
        ("p.tsv", 'prompt\n"a ""red"" fox"\n', r"row 0, .* quoted as in CSV: .* \.csv"),
        ("p.tsv", "prompt\ra\rb", "a carriage return alone is no line end"),
        ("p.txt", "a fox\ran owl\r", "a carriage return alone is no line end"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b', r"row 1, counted from 0 \(line 3\): Unterminated"),
        ("p.jsonl", '"a"\n{"prompt": "b"', r"row 1, .*: .*: is the file whole\?"),
        ("p.jsonl", '"a"\n' + 100_000 * "[", r"row 1, .*nested"),
        ("p.json", 100_000 * "[", "nested"),
        (
            "p.jsonl",
            f'{{"prompt": "a"}}\n{{"prompt": {HALF}}}\n',
            "row 1, counted from 0: half of a character",
        ),
        ("p.jsonl", f'{{"prompt": "a", "tag": {HALF}}}\n', "row 0, counted from 0: half of a character"),
        ("p.json", f'["a", {HALF}]', "row 1, counted from 0: half of a character"),
        ("p.txt", "a\nb \ud83d\n", r"line 2 isn't UTF-8 \(byte 0xed\)"),
        ("p.csv", b"\xef\xbb\xbfprompt\n\xff", r"line 2 isn't UTF-8 \(byte 0xff\)"),
        ("p.txt", "a\nb\0", "line 2 holds a NUL character"),
        ("folder/train.csv", "id,prompt\n1,a fox, sitting\n2,an owl, red\n", "train.csv: row 0, .*3 cells"),
        ("folder/train.jsonl", '{"prompt": "a"}\n{"prompt": "b', r"train.jsonl: row 1, .*: Unterminated"),
        ("folder/train.jsonl", f'{{"prompt": {HALF}}}\n', "train.jsonl: row 0, .*: half of a character"),
    ],
)
def test_what_would_be_misread_is_refused_with_its_row(tmp_path, name, content, message):
    file = tmp_path / name
    write(file, content)
    check_refused(str(file.parent if "folder" in name else file), message)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_other_encodings_are_named(tmp_path, suffix, encoding):
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    name = "UTF-32" if "32" in encoding else "UTF-16"
    file = write(tmp_path / f"p.{suffix}", f"{mark}prompt\na fox\n".encode(encoding))
    check_refused(file, f"it is {name}: save it as UTF-8, .*`iconv -f {name} -t UTF-8`")


def test_parquet_that_is_not_utf8_names_the_row(tmp_path):
    texts = pa.array([b"a fox", b"an owl", b"half \xed\xa0\xbd"])
    prompts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"id": [0, 1, 2], "prompt": prompts}), tmp_path / "p.parquet", row_group_size=2)
    check_refused(str(tmp_path / "p.parquet"), r"Invalid UTF8 sequence at string index 2")


READ = """
import sys
from am_diffusers.prompts.sets import load_prompts, load_texts
for source in sys.argv[1:]:
    print(load_prompts(source).prompts, load_texts(source))
"""


def test_local_files_need_no_writable_cache(tmp_path):
    (tmp_path / "file").write_text("no folder can be made in here")
    prompts = datasets.Dataset.from_dict({"prompt": ["a fox", "an owl"], "p.x": [1, 2], "p": [3, 4]})
    prompts.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "folder").mkdir()
    prompts.to_parquet(tmp_path / "folder/train-0.parquet")
    write(tmp_path / "csv/train.csv", "prompt\na fox\nan owl\n")
    prompts.save_to_disk(tmp_path / "saved")
    sources = [str(tmp_path / name) for name in ("p.parquet", "folder", "csv", "saved")]
    nowhere = {name: str(tmp_path / "file/cache") for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", READ, *sources], env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["('a fox', 'an owl') ['a fox', 'an owl']"] * len(sources), done.stderr


def test_a_cache_that_is_not_writable_is_named_instead_of_the_data(tmp_path):
    (tmp_path / "file").write_text("no folder can be made in here")
    write(tmp_path / "json/train.json", '[{"prompt": "a fox"}]')
    nowhere = {name: str(tmp_path / "file/cache") for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "json")],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
    )
    assert f"cache {tmp_path}/file/cache can't be written: set HF_DATASETS_CACHE" in done.stderr
