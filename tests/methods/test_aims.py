"""What the model card says of a run: the tilt is claimed where it is the optimum, and nowhere else."""

import re

import pytest

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from am_diffusers.models import FAMILIES
from am_diffusers.run.card import write_card
from am_diffusers.run.plan import make_plan
from am_diffusers.run.sharing import card_facts
from finetune_runs import tiny_config

STOCHASTIC = ("adjoint_matching", "buffered_adjoint_matching")
OTHER_LAWS = ("deterministic_adjoint_matching", "efficient_adjoint_matching", "draft", "refl")
CLAIM = "4 iterations of 4 images towards `p_base(image) * exp(5 * reward(image))`"
FIRST_ORDER = "towards a law that is `p_base(image) * exp({} * reward(image))` to first order"


@pytest.fixture
def config(tiny_sd3_dir, tmp_path):
    def make(method, **changes):
        pairs = {} if not METHODS[method].compares_samples else {"samples_per_prompt": 2}
        rewards = {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None}
        values = {"method": method, "reward_scale": 5, "num_inference_steps": 20} | pairs | rewards | changes
        return parse_config(["--config", str(tiny_config(tiny_sd3_dir, tmp_path, **values))])

    return make


FAMILY = FAMILIES["StableDiffusion3Pipeline"]


def aim(config):
    """Return the sentence of the model card."""
    return card_facts(make_plan(config, 1), None, FAMILY).law


@pytest.mark.parametrize("method", METHODS)
def test_the_tilt_is_claimed_by_methods_whose_optimum_it_is(config, method):
    text = aim(config(method))
    claims = method in (*STOCHASTIC, "reward_weighted_matching")
    assert text.startswith(CLAIM) == claims
    assert text.startswith("4 iterations of 4 images ")
    assert METHODS[method].aims_at_tilt == claims
    if method in STOCHASTIC:
        assert text == f"{CLAIM}."
        masked = f"{CLAIM}, less as the worst rows are left out (mask_quantile 0.9)."
        assert aim(config(method, mask_quantile=0.9)) == masked
    elif claims:
        assert text == f"{CLAIM}."
        early = f"{CLAIM}, as far as the reward is decided above noise level 0.4."
        assert aim(config(method, rwm_sigma_min=0.4)) == early
    elif method in OTHER_LAWS:
        assert "p_base" not in text
    else:
        assert FIRST_ORDER.format(5) in text


@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout_guidance_scale": 2.0}, "guidance 2 in the rollout alone"),
        ({"rollout_guidance_scale": 2.0, "guidance_mode": "everywhere"}, "guidance 2 everywhere"),
        ({"rollout_guidance_scale": 2.0, "divergence": "js"}, "guidance 2 in the rollout alone"),
        ({"reward_smoothing_std": 0.1}, "the reward is smoothed"),
        ({"reward_clip_quantile": 0.9}, "large reward gradients are clipped"),
        (
            {"ode_tail": 2, "tail_samples": 1, "num_inference_steps": 10},
            "rollouts end in 2 steps of the ODE (ode_tail), a bias",
        ),
    ],
)
def test_settings_that_take_the_tilt_from_adjoint_matching_take_the_claim(config, method, changes, reason):
    text = aim(config(method, **changes))
    assert text.endswith(f"with reward scale 5, towards no known law: {reason}.")


def test_another_divergence_has_another_law(config):
    text = aim(config("adjoint_matching", divergence="js", mask_quantile=None))
    assert text.endswith("images, divergence js from the base, reward scale 5.")


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("flow_grpo", {"grpo_kl_weight": 0.0}, "nothing holds the policy to the base"),
        ("flow_grpo", {"advantages": "normalised"}, "rewards are divided by their deviation within a prompt"),
        ("flow_grpo", {"rollout_guidance_scale": 2.0}, "guidance 2 everywhere"),
        ("ram", {"advantages": "normalised"}, "rewards are divided by their deviation within a prompt"),
        ("ram", {"rollout_guidance_scale": 2.0}, "guidance 2 in the rollout alone"),
        ("reward_weighted_matching", {"rollout_guidance_scale": 2.0}, "guidance 2 everywhere"),
    ],
)
def test_values_aim_at_a_law_with_centred_advantages_a_kl_and_no_guidance(config, method, changes, reason):
    assert aim(config(method, **changes)).endswith(f"towards no known law: {reason}.")


def test_the_kl_weight_of_flow_grpo_divides_the_scale(config):
    assert FIRST_ORDER.format(10) in aim(config("flow_grpo", grpo_kl_weight=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_the_card_names_the_method_and_its_paper(config, method, tmp_path):
    plan = make_plan(config(method), 1)
    facts = card_facts(plan, None, FAMILY)
    text = write_card(tmp_path, facts, None).read_text()
    title, paper = METHODS[method].title, METHODS[method].paper
    assert f"fine-tuned by {title} ([arXiv {paper}](https://arxiv.org/abs/{paper}))" in text
    assert f"\n- {title.lower().replace(' ', '-')}\n" in text
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", text)) == {paper}
    assert facts.law in text
