import datetime
import json

import datasets
import huggingface_hub.constants
import pytest
from PIL import Image

from am_diffusers.prompts.sets import load_prompts

GENEVAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    {
        "tag": "colors",
        "include": [{"class": "bench", "count": 1, "color": "red"}],
        "exclude": [{"class": "bench", "count": 2}],
        "prompt": "a photo of a red bench",
    },
]
DRAWBENCH = 'Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\n'
PARTI = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tn\nan owl\tAnimals\tStyle & Format\t\n"


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_csv_like_drawbench(tmp_path):
    found = load_prompts(write(tmp_path / "d.csv", "\ufeff" + DRAWBENCH))
    assert found.prompts == ("A red car.", "One cat, two dogs.")
    assert found.categories == {"Category": ("Colors", "Counting")}
    assert found.rows[1] == {"Prompts": "One cat, two dogs.", "Category": "Counting"}
    assert len(found) == 2


def test_tsv_like_partiprompts(tmp_path):
    found = load_prompts(write(tmp_path / "p.tsv", PARTI))
    assert found.prompts == ("bond", "an owl")
    assert found.categories == {"Category": ("Abstract", "Animals"), "Challenge": ("Basic", "Style & Format")}
    assert found.rows[0]["Note"] == "n"


def test_json_like_hpdv2_is_a_list_of_texts(tmp_path):
    found = load_prompts(write(tmp_path / "anime.json", json.dumps([" a fox", "an owl\n"])))
    assert (found.prompts, found.categories, found.rows) == (("a fox", "an owl"), {}, ())


def test_jsonl_like_geneval_keeps_the_metadata(tmp_path):
    found = load_prompts(write(tmp_path / "g.jsonl", "\n".join(map(json.dumps, GENEVAL))))
    assert found.prompts == ("a photo of two clocks", "a photo of a red bench")
    assert found.categories == {"tag": ("counting", "colors")}
    assert list(found.rows) == GENEVAL


def test_json_like_imagereward_has_no_category(tmp_path):
    rows = [{"id": "005695-0057", "prompt": "a car"}, {"id": "1", "prompt": "a car"}]
    found = load_prompts(write(tmp_path / "i.json", json.dumps(rows)))
    assert (found.prompts, found.categories, list(found.rows)) == (("a car", "a car"), {}, rows)


def test_txt_and_limit(tmp_path):
    source = write(tmp_path / "p.txt", "a fox\n\n  an owl \na fox\n")
    assert load_prompts(source).prompts == ("a fox", "an owl", "a fox")
    assert load_prompts(source, limit=2).prompts == ("a fox", "an owl")
    assert load_prompts(source, limit=9).prompts == ("a fox", "an owl", "a fox")
    with pytest.raises(ValueError, match="expected at least one, got a limit of 0"):
        load_prompts(source, limit=0)


@pytest.fixture(scope="module")
def pictures():
    """Rows with everything that isn't JSON."""
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "picture": datasets.Image(),
            "more": datasets.List({"picture": datasets.Image()}),
            "jpg_0": datasets.Value("binary"),
            "style": datasets.ClassLabel(names=["anime", "photo"]),
            "created_at": datasets.Value("timestamp[ns]"),
            "score": datasets.Value("float32"),
        }
    )
    picture = Image.new("RGB", (2, 2))
    row = {"picture": picture, "more": [{"picture": picture}], "jpg_0": b"x", "score": float("nan")}
    row["created_at"] = datetime.datetime(2023, 5, 1)
    rows = [{**row, "caption": f"prompt {i}", "style": i % 2} for i in range(3)]
    return datasets.Dataset.from_list(rows, features=features)


def check_pictures(found, number):
    assert found.prompts == tuple(f"prompt {i}" for i in range(number))
    assert found.categories == {"style": ("anime", "photo", "anime")[:number]}
    row = {"caption": "prompt 0", "style": "anime", "created_at": "2023-05-01T00:00:00", "score": None}
    assert found.rows[0] == row
    json.dumps(found.rows, allow_nan=False)


def test_parquet_rows_become_json_without_pictures(tmp_path, pictures):
    pictures.to_parquet(tmp_path / "p.parquet")
    check_pictures(load_prompts(str(tmp_path / "p.parquet")), 3)
    check_pictures(load_prompts(str(tmp_path / "p.parquet"), limit=2), 2)


def test_folders_have_one_split_or_a_named_one(tmp_path, pictures):
    pictures.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": pictures, "b": pictures.select([0])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files/test.csv", DRAWBENCH)
    check_pictures(load_prompts(str(tmp_path / "one"), limit=7), 3)
    assert len(load_prompts(str(tmp_path / "two"), split="b")) == 1
    assert load_prompts(str(tmp_path / "files")).categories == {"Category": ("Colors", "Counting")}
    with pytest.raises(ValueError, match=r"two: cannot be read: name one of its splits: a, b"):
        load_prompts(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"files: cannot be read: .*nosplit"):
        load_prompts(str(tmp_path / "files"), split="nosplit")


def test_hub_data_set_offline(tmp_path, monkeypatch):
    """What `hf download` put into the cache is read; without it the command is named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"o/n: cannot be read: .*run hf download --repo-type dataset o/n$"):
        load_prompts("o/n")
    folder = tmp_path / "datasets--o--n"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    write(folder / "refs/main", "0")
    write(folder / "snapshots/0/test.csv", DRAWBENCH)
    streamed = load_prompts("o/n", limit=1)  # first: later, the columns of the csv are known
    assert (streamed.prompts, streamed.categories) == (("A red car.",), {"Category": ("Colors",)})
    assert load_prompts("o/n").prompts == ("A red car.", "One cat, two dogs.")


def test_columns_are_found_whatever_their_case_or_named(tmp_path):
    rows = [{"Text": "t", "CAPTION": "c", "Style": ["x", "y"], "tag": 3, "other": " o "}]
    source = write(tmp_path / "p.json", json.dumps(rows))
    found = load_prompts(source)
    assert (found.prompts, found.categories) == (("c",), {"Style": ("x, y",), "tag": ("3",)})
    found = load_prompts(source, column="Text", category_columns=["other"])
    assert (found.prompts, found.categories) == (("t",), {"other": ("o",)})
    assert load_prompts(source, category_columns=[]).categories == {}


def test_a_prompt_without_category(tmp_path):
    rows = [{"prompt": "a", "tag": None}, {"prompt": "b"}, "c", {"prompt": "d", "tag": "t"}]
    found = load_prompts(write(tmp_path / "p.json", json.dumps(rows)))
    assert found.prompts == ("a", "b", "c", "d")
    assert found.categories == {"tag": ("", "", "", "t")}
    assert found.rows[2] == {}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("p.csv", "id,words\n1,a\n", {}, "no column is named prompt, .* or text; it has 'id', 'words'"),
        ("p.csv", DRAWBENCH, {"column": "prompts"}, "no column 'prompts'; it has 'Category', 'Prompts'"),
        ("p.csv", DRAWBENCH, {"category_columns": ["tag"]}, "no column 'tag'; it has 'Category', 'Prompts'"),
        ("p.txt", "a\n", {"category_columns": ["tag"]}, "no column 'tag': it is a list of texts"),
        ("p.txt", "a\n", {"column": "prompt"}, "no column 'prompt': it is a list of texts"),
        ("p.csv", "prompt,tag\na cat, two dogs,t\n", {}, r"row 0, .*: 3 cells, the header has 2"),
        ("p.csv", "prompt,tag\na,t\n ,t\n", {}, r"1 rows hold no text \(first: row 1"),
        ("p.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', {}, r"1 rows hold no text \(first: row 1"),
        ("p.json", '{"prompt": "a"}', {}, "list of strings or of objects"),
        ("p.json", "[1]", {}, "1 rows hold no text"),
        ("p.json", "[", {}, "cannot be read"),
        ("p.txt", "\n", {}, "no prompt in it"),
        ("p.csv", "prompt,tag\n", {}, "no prompt in it"),
        ("p.parquet", "PAR1", {}, "cannot be read"),
        ("p.docx", "", {}, "a file ends in one of"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, name, content, options, message):
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(source, **options)
    assert source in str(caught.value)
