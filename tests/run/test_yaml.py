"""Config files as users write them: what YAML reads as something else is taken as meant, or named."""

import pytest

from am_diffusers.config.command_line import parse_config

MINIMAL = """
pretrained_model_name_or_path: asset:tiny_sd3
train_prompts: prompts.txt
output_dir: out
rewards: [{name: pickscore, model: asset:tiny_pickscore}]
"""


@pytest.fixture
def parsed(tmp_path):
    """A function from lines of YAML and flags to the values of all flags."""

    def parsed(text, *flags):
        (tmp_path / "run.yaml").write_text(MINIMAL)
        (tmp_path / "more.yaml").write_text(text + "\n")
        files = [tmp_path / "run.yaml", *([tmp_path / "more.yaml"] if text else [])]
        return parse_config([*(f"--config={file}" for file in files), *flags]).flags()

    return parsed


def test_no_and_whole_numbers_with_an_exponent_are_what_was_meant(parsed):
    flags = parsed("mixed_precision: no\nmax_train_steps: 1e3\nrollout_micro_batch_size: 1E1\nuse_ema: no")
    assert (flags["mixed_precision"], flags["use_ema"]) == ("no", False)
    assert (flags["max_train_steps"], flags["rollout_micro_batch_size"]) == (1000, 10)
    assert type(flags["max_train_steps"]) is int
    assert type(parsed("learning_rate: 1e0")["learning_rate"]) is float
    rewards = "[{name: pickscore, mixed_precision: no, batch_size: 2e0}]"
    for (reward,) in (
        parsed(f"rewards: {rewards}")["rewards"],
        parsed("", "--rewards", rewards)["rewards"],
    ):
        assert (reward.mixed_precision, reward.batch_size) == ("no", 2)
    assert parsed("", "--max_train_steps", "1e3", "--loss_steps=1e1")["max_train_steps"] == 1000
    assert parsed("", "--revision", "1e3")["revision"] == "1e3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: 2024_05_01", "--output_dir must be text, but YAML reads 20240501: quote it"),
        (
            "validation_prompts:\n- a sign: open",
            "--validation_prompts must be a list of texts, but YAML reads {'a sign': 'open'}: quote it",
        ),
        (
            "validation_prompts: [no]",
            "--validation_prompts must be a list of texts, but YAML reads False: quote it",
        ),
        ("revision: 1e5", "--revision must be text or null, but YAML reads 100000.0: quote it"),
        ("eval_prompts: 007", "--eval_prompts must be text or null, but YAML reads 7: quote it"),
        (
            "lora_layers: [on]",
            "--lora_layers must be a list of texts or null, but YAML reads True: quote it",
        ),
        ("report_to: no", "--report_to must be tensorboard, wandb, trackio or none, got False"),
        ("max_train_steps: 1.5", "--max_train_steps must be a whole number, got 1.5"),
        ("seed: true", "--seed must be a whole number, got True"),
        ("loss_steps: few", "--loss_steps must be a whole number or all, got few"),
        ("rank: null", "--rank must be a whole number, got null"),
        ("learning_rate: .inf", "--learning_rate must be a finite number, got inf"),
        ("adam_beta1: .nan", "--adam_beta1 must be a finite number, got nan"),
        ("rank: 9223372036854775808", "--rank must be at most 2.*, got 9223372036854775808"),
        ("rewards: [pickscore]", "--rewards must be a list of rewards"),
        ("rewards: [{name: x, weight: .nan}]", "--rewards weight must be a finite number, got nan"),
        ("rewards: [{name: x, weight: null}]", "--rewards weight must be a number, got null"),
        ("rewards: [{name: x, model: 12}]", "--rewards model must be text or null, but YAML reads 12"),
        ("train_prompts: a: b", r"more\.yaml, line 1: mapping values are not .*: quote text"),
        ("- rank", r"more\.yaml: expected lines `flag: value`"),
        ("# nothing", r"more\.yaml: expected lines `flag: value`"),
    ],
)
def test_what_is_misread_is_named_in_one_line(parsed, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parsed(text)
    assert len(str(caught.value).splitlines()) <= 2
