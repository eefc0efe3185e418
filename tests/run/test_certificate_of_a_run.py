"""The certificate of a run and reward_scale auto, on random models."""

import json

import numpy as np
import pytest

from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.rewards import RewardScale
from am_diffusers.run import base_scores as base_scores_module
from am_diffusers.run.base_scores import load_scores
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import read_lines
from finetune_runs import tiny_config, write_rewards


@pytest.fixture(scope="module")
def rewards_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    return folder


@pytest.fixture
def parsed(tiny_sd3_dir, rewards_dir, tmp_path):
    """A function from changes of the small run to its parsed config."""

    def parse(**changes):
        rewards = {
            "rewards": [{"name": "pickscore", "model": str(rewards_dir / "pickscore")}],
            "eval_rewards": [{"name": "hpsv2", "model": str(rewards_dir / "hpsv2")}],
            "report_to": "none",
        }
        path = tiny_config(tiny_sd3_dir, tmp_path, **(rewards | changes))
        return parse_config(["--config", str(path)])

    return parse


def make(config):
    accelerator = make_accelerator(config)
    return build(make_plan(config, accelerator.num_processes), accelerator)


def frontier_in(file):
    return Frontier.of(load_scores(file), {"pickscore": RewardScale()})


def test_a_run_logs_its_distance_from_the_tilt(parsed, tmp_path):
    scale = 0.3  # eight images tell no more
    make(parsed(reward_scale=scale, max_train_steps=2)).execute()
    frontier = frontier_in(tmp_path / "out/certificate.json")
    assert frontier.rewards.shape == (3, 8)
    first, last = read_lines(tmp_path / "out/validation.jsonl")
    assert first["validation/path_kl"] == 0
    assert first["validation/gain"] == pytest.approx(
        0, abs=1e-4
    )  # the base's images were made in larger batches
    tilted = frontier.tilt(scale)
    headroom = (tilted.log_normaliser - scale * frontier.rewards.mean(1)).mean()
    assert first["validation/tilt_gap"] == pytest.approx(headroom - first["validation/objective"])
    assert first["validation/predicted"] == pytest.approx((tilted.reward - frontier.rewards.mean(1)).mean())
    assert last["validation/path_kl"] > 0
    objective = scale * last["validation/gain"] - last["validation/path_kl"]
    assert last["validation/objective"] == pytest.approx(objective)
    assert last["validation/tilt_gap"] == pytest.approx(headroom - objective)
    assert last["validation/attained"] == pytest.approx(objective / headroom)


def test_a_scale_is_chosen_once_and_kept(parsed, tmp_path, monkeypatch):
    flags = {"reward_scale": "auto", "target_kl": 0.1, "max_train_steps": 2}
    run = make(parsed(**flags))
    scale = run.trainer.method.shared.scale
    frontier = frontier_in(tmp_path / "out/frontier.json")
    assert frontier.tilt(scale).kl.mean() == pytest.approx(0.1, rel=1e-5)
    assert set(json.loads((tmp_path / "out/frontier.json").read_text())["scores"]) == {"pickscore", "hpsv2"}
    assert f"reward_scale: {scale}\n" in (tmp_path / "out/config.yaml").read_text()
    run.execute()
    assert f"exp({scale:g} * reward(image))" in (tmp_path / "out/README.md").read_text()
    monkeypatch.setattr(base_scores_module, "score_images", None)  # would be an error to call
    again = make(parsed(**flags))
    assert again.trainer.method.shared.scale == scale
    again.lock.release()


def test_a_stored_frontier_is_read_and_shown(parsed, tmp_path, monkeypatch):
    scores = {"pickscore": np.random.default_rng(0).normal(size=(4, 32)).tolist()}
    (tmp_path / "told.json").write_text(json.dumps({"prompts": ["a"] * 4, "scores": scores}))
    flags = {"reward_scale": "auto", "target_kl": 0.2, "frontier": str(tmp_path / "told.json")}
    told = make_plan(parsed(**flags), 1).describe()
    assert "# gains of tilts of the base in base sd, told by 4 prompts x 32 images:" in told
    run = make(parsed(**flags, certificate_images=0))
    frontier = frontier_in(tmp_path / "told.json")
    assert run.trainer.method.shared.scale == pytest.approx(frontier.scale_at(0.2))
    assert not (tmp_path / "out/certificate.json").exists()
    run.lock.release()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": 1.0}, "--target_kl must be set with reward_scale auto, for instance to 1.0, and only"),
        ({"reward_scale": "auto"}, "--target_kl must be set with reward_scale auto"),
        ({"reward_scale": "auto", "target_kl": -1.0}, "--target_kl must be a positive number of nats"),
        ({"reward_scale": -1.0}, "--reward_scale must be positive, as rewards are higher-is-better, or auto"),
        ({"certificate_images": 4}, "--certificate_images must be at least 8, or 0, got 4"),
        (
            {"reward_scale": "auto", "target_kl": 1.0, "certificate_images": 0},
            "--certificate_images must be positive with reward_scale auto, or --frontier given",
        ),
        (
            {"reward_scale": "auto", "target_kl": 1.0, "divergence": "js"},
            "--reward_scale must be a number with divergence js",
        ),
        (
            {"early_stopping_metric": "tilt_gap", "certificate_images": 0},
            "--early_stopping_metric must be gain without certificate_images",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(parsed, changes, message):
    with pytest.raises(ValueError, match="--") as caught:
        parsed(**changes)
    assert message in str(caught.value)


def test_a_frontier_that_is_not_there_is_named_before_a_model_is_loaded(parsed, tmp_path):
    with pytest.raises(ValueError, match=r"--frontier .*none\.json: no such file; scripts/calibrate"):
        make_plan(parsed(frontier=str(tmp_path / "none.json")), 1)
    (tmp_path / "other.json").write_text('{"prompts": [], "scores": {"hpsv2": [[1, 2, 3]]}}')
    with pytest.raises(
        ValueError, match=r"other\.json has no scores of pickscore: calibrate with this config"
    ):
        make_plan(parsed(frontier=str(tmp_path / "other.json")), 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "other.json").rename(tmp_path / "out/frontier.json")  # an earlier run's with other rewards
    assert "gains of tilts" not in make_plan(parsed(), 1).describe()


def test_a_target_beyond_what_the_images_tell_is_refused(parsed):
    with pytest.raises(
        ValueError, match=r"--target_kl 9: these base images, 8 a prompt, tell the tilt up to"
    ):
        make(parsed(reward_scale="auto", target_kl=9.0))


def test_a_reward_that_tells_no_images_apart_has_no_certificate(parsed, tmp_path, caplog, monkeypatch):
    from am_diffusers.rewards import Brightness

    monkeypatch.setattr(Brightness, "__call__", lambda self, images, prompts: 0 * images.flatten(1).sum(1))
    run = make(parsed(rewards=[{"name": "brightness"}], max_train_steps=1))
    run.trainer.train()
    run.lock.release()
    assert "no certificate: all base images of a prompt have the same reward" in caplog.text
    (_, last) = read_lines(tmp_path / "out/validation.jsonl")
    assert "validation/objective" not in last


def test_an_early_stop_by_the_gap_follows_the_objective(parsed):
    run = make(parsed(early_stopping_metric="tilt_gap", early_stopping_patience=1))
    assert run.trainer.options.early_stopping_metric == "validation/objective"
    run.lock.release()
