"""`scripts/sample.py` with LoRAs of every form, and with files that it must refuse."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from finetune_runs import FINETUNE
from lora_forms import FORMS, bad_files, write_forms

SCRIPT = FINETUNE.parent / "sample.py"


@pytest.fixture(scope="module")
def forms(tiny_sd3_dir, tmp_path_factory):
    return write_forms(tiny_sd3_dir, tmp_path_factory.mktemp("forms"))


@pytest.fixture
def sample(tiny_sd3_dir, tmp_path, monkeypatch):
    """A function from flags to the pixels of one image."""

    def sample(*more):
        sizes = ["--resolution", 64, "--max_sequence_length", 8, "--num_inference_steps", 2]
        flags = ["--model", tiny_sd3_dir, "--prompts", "a fox", "--output", tmp_path / "out", *sizes, *more]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return np.asarray(Image.open(tmp_path / "out/0000-seed0.png")).astype(int)

    return sample


def test_every_form_renders_what_this_program_writes(sample, forms):
    base, expected = sample(), sample("--lora", forms["own"])
    assert np.abs(expected - base).max() > 10
    for form in FORMS:
        assert np.abs(sample("--lora", forms[form]) - expected).max() <= 1, form
    half = [sample("--lora", forms[form], "--lora_scale", 0.5) for form in ("own", "kohya")]
    assert np.abs(half[1] - half[0]).max() <= 1
    assert np.abs(half[0] - expected).max() > 2


def test_bad_files_end_in_one_line(sample, forms, tmp_path):
    for name, (file, message) in bad_files(forms["own"], tmp_path).items():
        with pytest.raises(SystemExit) as error:
            sample("--lora", file)
        line = str(error.value)
        assert line.startswith("error: "), name
        assert str(file) in line, name
        assert message in line, name
        assert "\n" not in line, name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--num_images", "0", "must be a whole number of at least 1, got '0'"),
        ("--num_inference_steps", "0", "must be a whole number from 1 to 1000, got '0'"),
        (
            "--resolution",
            "0",
            "must be a side in pixels such as 512, or WIDTHxHEIGHT such as 832x480, got '0'",
        ),
        ("--lora_scale", "nan", "must be a finite number, got 'nan'"),
        ("--guidance_scale", "0", "must be at least 1 (1 = no guidance"),
        ("--seed", "18446744073709551617", "must be a whole number from 0 to 2**63 - 1, got '1844"),
    ],
)
def test_numbers_out_of_range_are_refused(sample, capsys, tmp_path, flag, value, message):
    with pytest.raises(SystemExit):
        sample(flag, value)
    assert f"argument {flag}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_the_pipeline_takes_are_refused(sample, tmp_path):
    with pytest.raises(SystemExit, match="error: max_sequence_length is 600, expected 1 to 512"):
        sample("--max_sequence_length", 600)
    assert not (tmp_path / "out").exists()
