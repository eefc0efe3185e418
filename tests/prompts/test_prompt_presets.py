import json
import re

import datasets
import huggingface_hub.constants
import pytest

from am_diffusers.prompts.presets import PRESETS, describe_source
from am_diffusers.prompts.sets import load_prompts, load_texts

STYLES = ("anime", "concept-art", "paintings", "photo")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def downloaded(cache, name):
    """The folder into which `hf download` would put a preset's files."""
    preset = PRESETS[name]
    repository = preset.repository.replace("/", "--")
    folder = cache / f"datasets--{repository}" / "snapshots" / preset.revision
    for file in preset.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    return folder


def test_every_published_set_is_pinned():
    for name, preset in PRESETS.items():
        assert preset.files
        if not name.startswith("tiny"):
            assert re.fullmatch(r"[\w-]+/[\w-]+", preset.repository)
            assert re.fullmatch("[0-9a-f]{40}", preset.revision)
            assert preset.revision in describe_source(name)


def test_lists_of_the_embedded_model(cache):
    assert len(load_prompts("tiny")) == 56
    assert len(load_prompts("tiny-train", limit=9)) == 9
    assert describe_source("tiny") == "tiny"


def test_downloaded_sets_are_read_offline(cache):
    (downloaded(cache, "DrawBench") / "DrawBench Prompts - Sheet1.csv").write_text("Prompts,Category\na,b\n")
    assert load_prompts("DrawBench").categories == {"Category": ("b",)}
    rows = datasets.Dataset.from_list([{"caption": "a fox", "image_0_uid": "1", "are_different": True}])
    rows.to_parquet(downloaded(cache, "Pick-a-Pic") / PRESETS["Pick-a-Pic"].files[0])
    assert load_prompts("Pick-a-Pic").prompts == ("a fox",)
    with pytest.raises(ValueError, match="a preset is one split, got 'train'"):
        load_prompts("DrawBench", split="train")
    assert load_texts("DrawBench") == load_texts("DrawBench", split="test") == ["a"]
    assert load_texts("Pick-a-Pic", limit=1) == ["a fox"]
    with pytest.raises(ValueError, match="a preset is one split, got 'dev'"):
        load_texts("DrawBench", split="dev")


def test_styles_of_hpdv2(cache):
    for style in STYLES:
        file = downloaded(cache, "HPDv2") / f"benchmark/{style}.json"
        file.write_text(json.dumps([f"{style} 0", f"{style} 1"]))
    found = load_prompts("HPDv2")
    assert found.prompts == tuple(f"{style} {i}" for style in STYLES for i in (0, 1))
    assert found.categories == {"style": tuple(style for style in STYLES for _ in (0, 1))}
    assert load_prompts("HPDv2", limit=3).prompts == found.prompts[:3]
    assert load_prompts("HPDv2", limit=3).categories == {"style": found.categories["style"][:3]}
    assert load_prompts("HPDv2", category_columns=[]).categories == {}
    folder = downloaded(cache, "HPDv2") / "benchmark"
    assert load_prompts(f"HPDv2={folder}") == found
    assert load_prompts(f"HPDv2={folder}/photo.json").prompts == ("photo 0", "photo 1")
    with pytest.raises(ValueError, match="one category is 'style', got tag"):
        load_prompts("HPDv2", category_columns=["tag"])
    (folder / "photo.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*photo.json; it is published as anime.json, "):
        load_prompts(f"HPDv2={folder}")


@pytest.mark.parametrize("name", ["DrawBench", "PartiPrompts", "HPDv2", "Pick-a-Pic"])
def test_a_set_that_is_not_here_names_the_command(cache, name):
    with pytest.raises(ValueError, match=f"prompts {name}: not in the cache") as caught:
        load_prompts(name)
    message = str(caught.value)
    preset = PRESETS[name]
    assert f"run `hf download --repo-type dataset {preset.repository} " in message
    assert f"--revision {preset.revision}`, or give a copy: `{name}=PATH`" in message
    assert "\n" not in message
    quoted = f"'{preset.files[0]}'" if " " in preset.files[0] else preset.files[0]
    assert f" {quoted} " in message


@pytest.mark.parametrize("name", ["GenEval", "ImageReward"])
def test_a_set_on_github_is_downloaded_by_the_user(cache, name):
    url = f"https://raw.githubusercontent.com/{PRESETS[name].repository}/{PRESETS[name].revision}/"
    with pytest.raises(ValueError, match=f"run `curl -L -O {url}.*json.*` and give `{name}=") as caught:
        load_prompts(name)
    assert "\n" not in str(caught.value)


def test_own_copy(cache, tmp_path):
    row = {"tag": "colors", "include": [], "prompt": "a red bench"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row))
    found = load_prompts("GenEval=evaluation_metadata.jsonl")
    assert (found.prompts, found.categories) == (("a red bench",), {"tag": ("colors",)})
    assert list(found.rows) == [row]
    with pytest.raises(ValueError, match=r"GenEval: there is no x.jsonl; it is published as evaluation_meta"):
        load_prompts("GenEval=x.jsonl")


def test_files_are_read_and_go_before_presets(cache, tmp_path):
    (tmp_path / "mine.txt").write_text("a fox\n")
    (tmp_path / "a=b.txt").write_text("an owl\n")
    assert load_prompts("mine.txt").prompts == ("a fox",)
    assert load_prompts("a=b.txt").prompts == ("an owl",)
    assert describe_source("mine.txt") == "mine.txt"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/test.txt").write_text("mine\n")
    assert load_prompts("tiny", column="text").prompts == ("mine",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "drawbench",
            r"'drawbench': did you mean 'DrawBench'\? \(known: DrawBench, Parti.*owner/name",
        ),
        ("PickaPic", "did you mean 'Pick-a-Pic'"),
        ("Geneval=x.jsonl", "'Geneval': did you mean 'GenEval'"),
        ("mime.txt", r"mime.txt: no such file: did you mean 'mine.txt'\?"),
        ("zzz.json", "zzz.json: no such file$"),
        ("no/where.txt", "no/where.txt: no such file$"),
        ("./no/where", "no such file or folder"),
        ("owner/name", "run hf download --repo-type dataset owner/name"),
    ],
)
def test_unknown_names_and_files_name_the_nearest(cache, tmp_path, source, message):
    (tmp_path / "mine.txt").write_text("a fox\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_a_hub_data_set_is_not_pinned(cache):
    assert describe_source("owner/name") == "owner/name on the hub, not pinned to a revision"
