"""The prompt lists for released models: size, variety, no repetition, licence; plans without a network."""

import itertools
import socket
from collections import Counter, defaultdict
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
from accelerate import Accelerator

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import describe
from am_diffusers.prompts.leaks import FILLERS, WORD, find_leaks
from am_diffusers.prompts.sets import load_texts
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import ASSETS

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN, EVAL = (load_texts(f"asset:prompts/general_{name}.txt") for name in ("train", "eval"))
EVERY = [*TRAIN, *EVAL]


def content(prompt: str) -> frozenset[str]:
    return frozenset(WORD.findall(prompt.casefold())) - FILLERS


def test_three_thousand_prompts_of_3_to_60_words() -> None:
    lengths = [len(prompt.split()) for prompt in EVERY]
    assert (len(TRAIN), len(EVAL)) == (2981, 200)
    assert (min(lengths), max(lengths)) == (3, 50)
    assert sum(length > 20 for length in lengths) > 100
    assert len(frozenset().union(*map(content, EVERY))) > 5000  # words


def test_no_prompt_says_what_another_says() -> None:
    own = [leak for leak in find_leaks(EVERY, EVERY).leaks if leak.prompt != leak.training_prompt]
    assert own == []
    assert len({prompt.casefold() for prompt in EVERY}) == len(EVERY)
    assert find_leaks(EVAL, TRAIN).leaks == ()


def test_no_two_prompts_share_most_of_their_words() -> None:
    words, holders = [content(prompt) for prompt in EVERY], defaultdict(list)
    for row, each in enumerate(words):
        for word in each:
            holders[word].append(row)
    shared = Counter(pair for rows in holders.values() for pair in itertools.combinations(rows, 2))
    alike = [(a, b) for (a, b), number in shared.items() if number / len(words[a] | words[b]) > 0.7]
    assert [(EVERY[a], EVERY[b]) for a, b in alike] == []


def test_no_template_repeats() -> None:
    openings = Counter(tuple(prompt.casefold().split()[:4]) for prompt in EVERY)
    assert max(openings.values()) <= 5


def test_styles_and_kinds_are_there() -> None:
    text = "\n".join(EVERY).casefold()
    styles = ("photo", "oil painting", "watercolour", "anime", "3d render", "pixel art", "ink", "pencil")
    kinds = ("portrait", "cat", "bread", "cathedral", "mountain", "bicycle", "abstract", "three", "left of")
    assert {word for word in (*styles, *kinds) if text.count(word) < 2} == set()
    assert sum('"' in prompt for prompt in EVERY) > 100  # text to be written


def test_the_licence_and_the_counts_are_stated() -> None:
    readme = (ASSETS / "prompts/README.md").read_text("utf-8")
    assert "\nLicence: CC0 1.0 " in readme
    for name in ("general_train", "general_eval", "train", "eval"):
        assert f"`{name}.txt`" in readme
        assert str(len(load_texts(f"asset:prompts/{name}.txt"))) in readme


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, empty caches, and nothing that says so to the libraries."""

    def refuse(*_: object) -> None:
        pytest.fail("tried to reach the network")  # no library catches it and tries again

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("cut_off")
@pytest.mark.parametrize("name", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_a_dry_run_of_a_released_config_reads_nothing_from_the_network(name: str) -> None:
    config = parse_config(["--config", str(CONFIGS / f"{name}.yaml"), "--dry_run"])
    plan = make_plan(config, 1)
    assert (plan.train_prompts, plan.eval_prompts, plan.leaks) == (TRAIN, EVAL, "")
    assert "hf download stabilityai/stable-diffusion-3" in describe(plan, Accelerator())
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("cut_off")
def test_a_dry_run_names_a_hub_list_that_is_not_here() -> None:
    argv = ["--config", str(CONFIGS / "sd35_medium.yaml"), "--dry_run", "--train_prompts", "owner/name"]
    with pytest.raises(ValueError, match=r"owner/name: cannot be read: .*run hf download"):
        make_plan(parse_config(argv), 1)


@pytest.mark.slow
@pytest.mark.usefixtures("cut_off")
def test_the_estimate_of_released_sizes_needs_no_network() -> None:
    folder = str(CONFIGS / "released/sd35_medium")
    argv = ["--config", str(CONFIGS / "sd35_medium.yaml"), "--dry_run", "--gpu", "H100"]
    plan = make_plan(parse_config([*argv, "--pretrained_model_name_or_path", folder]), 1)
    assert "memory of H100" in describe(plan, Accelerator())
