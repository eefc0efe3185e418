"""`eval/evaluate.py` from command line to summary, on random models."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate_runs import EVALUATE, arguments, prepare, run, start, write_lora
from finetune_runs import wait_for

TINY_SD3 = Path(__file__).parents[2] / "am_diffusers/assets/tiny_sd3"
EMBEDDED_PROMPTS = "a fox\nan apple on a blue background\na car\nan owl on a red background\na key\n"
FILES = ("summary.json", "scores.jsonl", "comparison.md", "comparison.csv", "comparison.tex")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_sd3_dir):
    folder = tmp_path_factory.mktemp("evaluate")
    prepare(tiny_sd3_dir, folder)
    return folder


@pytest.fixture(scope="module")
def command(folder, tiny_sd3_dir):
    return lambda name, *more: arguments(tiny_sd3_dir, folder, name, *more)


@pytest.fixture(scope="module")
def whole(folder, command):
    run(command("whole"), folder / "whole.log")
    return folder / "whole"


def pixels(output):
    files = sorted(output.glob("pictures/*/*.png"))
    assert len(files) == 2 * 4 * 5
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def assert_same_results(output, whole):
    for name in FILES:
        assert (output / name).read_text() == (whole / name).read_text(), name
    for file in whole.glob("pictures/*/*.png"):
        assert (output / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


def test_scores_belong_to_their_pictures(whole):
    lines = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert {line["candidate"] for line in lines} == {
        "base-steps3-guidance1",
        "lora-scale1-steps3-guidance1",
    }
    for line in lines:
        with Image.open(whole / line["file"]) as image:
            about = json.loads(image.text["am_diffusers"])
        assert (about["prompt"], about["seed"]) == (line["prompt"], line["seed"])
        assert set(line["scores"]) == {"pickscore", "hpsv2"}
    seeds = {(line["prompt_index"], line["image"]): set() for line in lines}
    for line in lines:
        seeds[line["prompt_index"], line["image"]].add(line["seed"])
    assert all(len(each) == 1 for each in seeds.values()), "base and tuned start from the same noise"
    assert len(set().union(*seeds.values())) == 20, "and every picture from its own"


@pytest.mark.parametrize("size", ["1", "3", "8"])
def test_pictures_do_not_depend_on_the_batch_size(folder, command, whole, size):
    """At most one level of 255 in .1 % of the values: matrix products round differently by batch size."""
    run(command(f"batch{size}", "--batch_size", size), folder / f"batch{size}.log")
    difference = np.abs(pixels(folder / f"batch{size}") - pixels(whole))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def kill_at(argv, output, log, seconds):
    """Start, and kill so many seconds after the folder is opened; whether it wasn't over by then."""
    process = start(argv, log)
    wait_for((output / "settings.json").exists, process)
    until = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > until, process)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_at_random_moments_the_results_are_the_same(folder, command, whole):
    log, rng = folder / "kill.log", random.Random(0)
    process = start(command("span"), folder / "span.log")
    wait_for(lambda: (folder / "span/settings.json").exists(), process)
    began = time.monotonic()
    process.join()
    span, kills = time.monotonic() - began, 0
    for attempt in range(40):
        output, kills_before = folder / f"kill{attempt}", kills
        for moment in [rng.uniform(0, span) for _ in range(1 + attempt % 3)]:
            kills += kill_at(command(output.name), output, log, moment)
        if kills > kills_before:
            run(command(output.name), log)
            assert_same_results(output, whole)
        if kills >= 5:
            return
    raise AssertionError(f"only {kills} kills came before the end of a run")


def test_a_signal_stops_it_and_the_same_command_goes_on(folder, command, whole):
    log, output = folder / "signal.log", folder / "signal"
    process = start(command("signal", "--batch_size", "16"), log)
    wait_for(lambda: len(list(output.glob("pictures/*/*.png"))) > 3, process)
    process._popen._send_signal(signal.SIGTERM)  # pyright: ignore[reportAttributeAccessIssue]
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, log.read_text()[-3000:]
    assert "run the same command again" in log.read_text()
    run(command("signal"), log)
    assert_same_results(output, whole)


def test_shards_meet_and_the_last_one_concludes(folder, command, whole):
    first = run(command("shards", "--shard", "1/2"), folder / "shard1.log")
    assert "this share is done" in first
    assert not (folder / "shards/summary.json").exists()
    second = run(command("shards", "--shard", "0/2"), folder / "shard0.log")
    assert "report:" in second
    assert_same_results(folder / "shards", whole)


def test_damaged_pictures_are_made_again_and_measured_again(folder, command, whole):
    run(command("damaged"), folder / "damaged.log")
    files = sorted((folder / "damaged").glob("pictures/*/*.png"))
    content = bytearray(files[3].read_bytes())
    content[len(content) // 2] ^= 1
    files[3].write_bytes(content)
    files[7].write_bytes(files[7].read_bytes()[:100])
    files[20].unlink()
    values = sorted((folder / "damaged").glob("rewards/*/hpsv2/*.safetensors"))
    values[1].write_bytes(values[1].read_bytes()[:-5])
    printed = run(command("damaged"), folder / "damaged.log")
    assert f"{files[3]} is made again" in printed
    assert f"{files[7]} is made again" in printed
    assert_same_results(folder / "damaged", whole)


def test_finished_it_only_writes_the_results_again(folder, command, whole):
    times = {file: file.stat().st_mtime_ns for file in whole.glob("*/*/**/*.*")}
    summary = (whole / "summary.json").read_text()
    run(command("whole"), folder / "again.log")
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert (whole / "summary.json").read_text() == summary


def test_a_further_reward_is_all_that_is_measured(folder, command):
    run(command("more"), folder / "more.log")
    pictures = {file: file.stat().st_mtime_ns for file in (folder / "more/pictures").glob("*/*")}
    with_more = command("more")
    with_more[with_more.index("--rewards") + 1 : with_more.index("--rewards") + 1] = ["brightness"]
    run(with_more, folder / "more.log")
    assert {file: file.stat().st_mtime_ns for file in pictures} == pictures
    line = json.loads((folder / "more/scores.jsonl").read_text().splitlines()[0])
    assert set(line["scores"]) == {"pickscore", "hpsv2", "brightness"}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Command line of a small evaluation of the embedded model; a LoRA far from zero."""
    folder = tmp_path_factory.mktemp("embedded")
    write_lora(str(TINY_SD3), folder / "lora", size=0.2)
    (folder / "prompts.txt").write_text(EMBEDDED_PROMPTS)

    def command(name, *more):
        return [
            *("--pretrained_model_name_or_path", "asset:tiny_sd3"),
            *("--lora_path", str(folder / "lora"), "--prompts", str(folder / "prompts.txt")),
            *("--rewards", "pickscore", "--num_images_per_prompt", "8", "--num_inference_steps", "10"),
            *("--output_dir", str(folder / name)),
            *more,
        ]

    run(command("whole"), folder / "whole.log")
    return folder, command


def embedded_pixels(output):
    files = sorted(output.glob("pictures/*/*.png"))
    assert len(files) == 2 * 5 * 8
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "3", "8"])
def test_pictures_of_the_embedded_model_by_batch_size(embedded, size):
    """As on the random model: float32 matrix products of other sizes round in another order."""
    folder, command = embedded
    run(command(f"batch{size}", "--batch_size", size), folder / f"batch{size}.log")
    difference = np.abs(embedded_pixels(folder / f"batch{size}") - embedded_pixels(folder / "whole"))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.slow
def test_two_processes_make_the_pictures_of_one_bit_for_bit(embedded):
    """The same chunks in the same batches, and threads of the same number."""
    folder, command = embedded
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "--main_process_port", str(free_port()), str(EVALUATE), *command("two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1
    assert (embedded_pixels(folder / "two") == embedded_pixels(folder / "whole")).all()
    assert (folder / "two/summary.json").read_text() == (folder / "whole/summary.json").read_text()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
