import csv
import json
import os
from pathlib import Path

import datasets
import pytest

from am_diffusers.prompts.order import fill_up, prompt_rows
from am_diffusers.prompts.sets import load_texts

PROMPTS = ["a red apple, 3d style", 'a "quoted" cat', "ein Bär"]
SHARED = Path(__file__).parents[3] / "shared/prompts"


def write(folder, suffix):
    path = folder / f"prompts.{suffix}"
    rows = [{"id": i, "text": prompt} for i, prompt in enumerate(PROMPTS)]
    if suffix == "txt":
        path.write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == "tsv":
        lines = ["id\ttext", *(f"{row['id']}\t{row['text']}" for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, suffix):
    source = write(tmp_path, suffix)
    assert load_texts(source, column="text") == PROMPTS
    assert load_texts(source, column="text", limit=2) == PROMPTS[:2]


def test_data_set_folders(tmp_path):
    rows = datasets.Dataset.from_dict({"text": PROMPTS})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "dict")
    assert load_texts(str(tmp_path / "one"), column="text") == PROMPTS
    assert load_texts(str(tmp_path / "dict"), column="text", split="test") == PROMPTS[1:2]
    with pytest.raises(ValueError, match=r"dict: cannot be read: .*nosplit"):
        load_texts(str(tmp_path / "dict"), column="text", split="nosplit")


def test_json_list_of_strings(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS))
    assert load_texts(str(tmp_path / "p.json")) == PROMPTS


@pytest.mark.skipif(not SHARED.exists(), reason="evaluation prompt sets lie outside the repository")
@pytest.mark.parametrize(
    ("name", "column", "count"),
    [
        ("drawbench.csv", "Prompts", 200),
        ("partiprompts.tsv", "Prompt", 1632),
        ("imagereward_benchmark.json", "prompt", 100),
    ],
)
def test_published_prompt_sets(name, column, count):
    assert len(load_texts(str(SHARED / name), column=column)) == count


@pytest.mark.skipif(not SHARED.exists(), reason="evaluation prompt sets lie outside the repository")
def test_the_prompt_of_partiprompts_that_begins_with_a_quote_keeps_it():
    prompts = load_texts(str(SHARED / "partiprompts.tsv"), column="Prompt")
    assert [prompt[:13] for prompt in prompts if prompt.startswith('"')] == ['"G I G G L E"']


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_missing_column_names_the_known_ones(tmp_path, suffix):
    with pytest.raises(ValueError, match="no column 'prompt'; it has 'id', 'text'"):
        load_texts(write(tmp_path, suffix))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n  \n", "no prompt in it"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read"),
        ("p.json", b"{", "cannot be read"),
        ("p.json", b'{"prompt": "a"}', "list of strings or of objects"),
        ("p.jsonl", b'"a"\n""\n', r"1 rows hold no text \(first: row 1"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', "1 rows hold no text"),
        ("p.csv", b"prompt,x\n", "no prompt in it"),
        ("p.parquet", b"PAR1", "cannot be read"),
        ("p.docx", b"", "a file ends in one of"),
    ],
)
def test_unreadable_files_name_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") == "0", reason="asks the hub")
@pytest.mark.parametrize("source", ["missing.txt", "./nowhere/prompts", "/nowhere/at/all", "nobody"])
def test_missing_source_is_not_looked_up_on_the_hub(source):
    with pytest.raises(ValueError, match=r"no such file|'nobody': did you mean"):
        load_texts(source)


def test_every_prompt_once_an_epoch_in_a_new_order():
    rows = [row for iteration in range(7) for row in prompt_rows(3, iteration, 5, 7)]
    epochs = [rows[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    assert prompt_rows(3, 2, 5, 7) == prompt_rows(3, 2, 5, 7) != prompt_rows(4, 2, 5, 7)


def test_a_batch_larger_than_the_list_takes_several_epochs():
    assert sorted(prompt_rows(0, 1, 6, 2)) == [0, 0, 0, 1, 1, 1]


def test_prompts_are_filled_up_at_random_without_repetition():
    pool = [f"prompt {i}" for i in range(20)]
    filled = fill_up(pool[3:5], pool, 10, seed=0)
    assert filled[:2] == pool[3:5]
    assert len(set(filled)) == len(filled) == 10
    assert filled == fill_up(pool[3:5], pool, 10, seed=0) != fill_up(pool[3:5], pool, 10, seed=1)
    assert filled[2:] != sorted(filled[2:], key=pool.index)
    assert fill_up(pool[:4], pool[:6], 16, seed=0)[:4] == pool[:4]
    assert sorted(fill_up(pool[:4], pool[:6], 16, seed=0)) == sorted(pool[:6])
    assert fill_up(["mine", "mine"], pool, 1, seed=0) == ["mine", "mine"]


def test_a_group_of_samples_shares_a_prompt():
    single = [row for iteration in range(4) for row in prompt_rows(3, iteration, 2, 5)]
    grouped = [row for iteration in range(4) for row in prompt_rows(3, iteration, 6, 5, samples_per_prompt=3)]
    assert grouped == [row for row in single for _ in range(3)]
