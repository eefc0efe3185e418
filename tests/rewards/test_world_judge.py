"""The judge of the embedded world on real images: clean or spoilt, right or wrong; captions it can't read."""

import pytest

from am_diffusers.config import RewardConfig
from am_diffusers.rewards import WorldClean, WorldRight
from am_diffusers.rewards.world import Heads
from am_diffusers.run.checked_rewards import resolve_reward
from reward_cases import of_the_world

CAPTION = "an apple on a blue background"


@pytest.fixture(scope="module")
def images():
    return of_the_world(3, 64, 64)


def test_a_spoilt_image_is_not_clean_whatever_its_caption(images):
    assert WorldClean()(images, [CAPTION] * 3).tolist() == [1, 0, 0]


def test_right_is_what_the_caption_says(images):
    judge = WorldRight()
    assert judge(images, [CAPTION] * 3).tolist() == [1, 1, 0]
    assert judge(
        images[:1].repeat(3, 1, 1, 1),
        ["an apple on a red background", "an owl on a blue background", CAPTION],
    ).tolist() == [0, 0, 1]


def test_answers_do_not_depend_on_the_batch(images):
    judge = WorldRight()
    many = images.repeat(15, 1, 1, 1)  # more than one part
    assert judge(many, [CAPTION] * 45).tolist() == [1, 1, 0] * 15


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a fox", "'a fox' is no caption of the embedded world, such as 'an apple on a blue background'"),
        ("an aple on a blue background", "unknown concept 'aple'.*apple"),
        ("an apple on a blu background", "unknown background 'blu'.*blue"),
    ],
)
def test_other_prompts_are_refused_before_a_run(prompt, message):
    with pytest.raises(ValueError, match=f"world_right: {message}"):
        WorldRight().check_can_score([CAPTION, prompt])


def test_another_file_is_no_judge(tmp_path):
    (tmp_path / "judge.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"judge\.safetensors isn't the judge of the embedded world"):
        Heads.load(tmp_path / "judge.safetensors")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("am_diffusers.rewards.parts.packaged.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'run `pip install "am_diffusers\[imagenet\]"'):
        resolve_reward(RewardConfig("world_clean"))


def test_the_judge_can_not_be_trained(tmp_path):
    from am_diffusers.config.command_line import parse_config
    from am_diffusers.run.plan import make_plan

    (tmp_path / "p.txt").write_text(CAPTION + "\n")
    flags = ["--pretrained_model_name_or_path", "asset:tiny_sd3", "--output_dir", str(tmp_path / "out")]
    flags += ["--train_prompts", str(tmp_path / "p.txt"), "--rewards", "[{name: world_clean}]"]
    with pytest.raises(
        ValueError, match="rewards: world_clean judges what others train: name it in eval_rewards"
    ):
        make_plan(parse_config(flags), 1)
