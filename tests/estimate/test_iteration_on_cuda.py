"""Whole iterations at the released widths on a card without data: where everything is, who waits.

The transformer has two blocks and each tower of a reward one layer. Values are made up: neither kernels nor
numbers are tested. buffered_adjoint_matching is left out: its data say which of its rows are drawn.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate.pretend import pretend
from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.methods import METHODS
from am_diffusers.models.base import Model
from am_diffusers.models.family import Encoded
from am_diffusers.models.text_encoders import PromptEncoder
from am_diffusers.rewards import LearnedReward, RewardOptions, RewardScale, WeightedRewards
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import encoder
from am_diffusers.run.plan import Plan, make_plan
from am_diffusers.run.surroundings import make_method
from am_diffusers.run.training import make_state, make_trainer
from am_diffusers.system.processes import Processes
from am_diffusers.training.state import TrainState
from am_diffusers.training.trainer import Hooks
from fake_cuda import CUDA, Waits, fake_cuda
from shallow_rewards import SHALLOW

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS = ["a red apple on a blue background", "an orange fox in white snow"]
SHORT = {
    "num_inference_steps": 3,
    "loss_steps": "all",
    "tail_samples": 4,  # the default, which methods without continuations insist on
    "train_batch_size": 2,
    "reward_micro_batch_size": 2,
    "dry_run": True,
    "report_to": "none",
    **dict.fromkeys(["train_prompts_column", "eval_prompts", "eval_prompts_column", "eval_rewards"]),
}
GROUPS = {"samples_per_prompt": 2}
METHOD_FLAGS: dict[str, dict[str, Any]] = {
    "adjoint_matching": {"loss_steps": 1, "tail_samples": 2},
    "deterministic_adjoint_matching": {"truncate_steps": 1},
    "draft": {"draft_steps": 1},
    "efficient_adjoint_matching": {"num_inference_steps": 20, "eam_ode_steps": 1},
    "flow_grpo": GROUPS,
    "ram": GROUPS,
    "refl": {"refl_last_steps": 1},
    "reward_weighted_matching": GROUPS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mask, offload": {"tail_samples": 1, "mask_quantile": 0.5, "offload_trajectories": True, "use_ema": True},
    "fp16, guidance": {
        "tail_samples": 1,
        "mixed_precision": "fp16",
        "rollout_guidance_scale": 2.0,
        "guidance_mode": "everywhere",
    },
    "full adjoint": {
        "tail_samples": 1,
        "adjoint": "full",
        "reward_smoothing_std": 0.1,
        "reward_smoothing_samples": 2,
    },
}
# A wait in one of these is in a pass: networks, and the engine of backward passes with what it recomputes.
OF_PASSES = ("/diffusers/", "/peft/", "/transformers/", "/open_clip/", "/torch/autograd/")


@dataclass
class Card:
    """A model and rewards on a card without data.

    Attributes:
        model: SD3.5 medium of two blocks, with its LoRA.
        rewards: the learned rewards, by name.
        mode: mode that makes tensors without data.
    """

    model: Model
    rewards: dict[str, LearnedReward]
    mode: FakeTensorMode


def make_released_plan(folder: Path, **flags: Any) -> Plan:
    """The plan of configs/sd35_medium.yaml with two transformer blocks and few samples and steps."""
    model, prompts = folder / "model", folder / "prompts.txt"
    shutil.copytree(CONFIGS / "released/sd35_medium", model, dirs_exist_ok=True)
    file = model / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 2}))
    prompts.write_text("\n".join(PROMPTS))
    places = {"pretrained_model_name_or_path": model, "train_prompts": prompts, "output_dir": folder / "out"}
    values = {name: "null" if value is None else value for name, value in (SHORT | places | flags).items()}
    given = [f"--{name}={value}" for name, value in values.items()]
    return make_plan(parse_config(["--config", str(CONFIGS / "sd35_medium.yaml"), *given]), 1)


def encode(pipe: Any, texts: list[str], length: int) -> list[Encoded]:
    """Rows of the released shapes, on the card as the text encoders leave them."""
    shapes = (77 + length, 4096), (2048,)
    return [Encoded(*(torch.empty(s, dtype=torch.bfloat16, device=CUDA) for s in shapes)) for _ in texts]


def make_card(folder: Path, **flags: Any) -> Card:
    """Build everything without data and move it to the card."""
    pretence = pretend(make_released_plan(folder, **flags), on_gpu=False)
    model, makers = pretence.model, {name: make(pretence.mode) for name, make in SHALLOW.items()}
    pipe = model.pipeline()
    pipe.text_encoder = torch.nn.Module()  # not freed
    model._prompts = PromptEncoder(pipe, replace(model.family, encode=encode))
    options = RewardOptions(device=CUDA, batch_size=2, checkpointing=True)
    with fake_cuda(pretence.mode):
        model.network.to(CUDA)
        model.vae.to(CUDA)
        rewards = {name: make(options) for name, make in makers.items()}
    return Card(model, rewards, pretence.mode)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return make_card(tmp_path_factory.mktemp("card"))


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One process that thinks it has the card."""
    made = make_accelerator(make_released_plan(tmp_path).config)
    monkeypatch.setattr(made.state, "device", CUDA)
    return made


def iterate(card: Card, accelerator: Any, plan: Plan, rewards: Sequence[str]) -> tuple[TrainState, Waits]:
    """Take an iteration; return the state after it, and its waits for the host."""
    config, processes, log = plan.config, Processes(accelerator), cast(Any, None)
    reward = WeightedRewards([card.rewards[name] for name in rewards], [RewardScale()] * len(rewards))
    hooks = Hooks(encode=encoder(config, card.model, config.shared.rollout_guidance_scale))
    with fake_cuda(card.mode) as waits:
        method = make_method(plan, card.model, reward, processes)
        state = make_state(config.optimizer, card.model.lora_parameters())
        trainer = make_trainer(plan, method, state, hooks=hooks, processes=processes, log=log)
        trainer.iterate()
    return state, waits


def check(state: TrainState, waits: Waits) -> None:
    """All that an iteration leaves is on the card, and no pass waited for the host."""
    gradients = {name: p.grad for name, p in state.parameters.items()}
    assert {name for name, g in gradients.items() if g is None or g.device != CUDA} == set()
    moments = [value for kept in state.optimizer.state.values() for value in kept.values() if value.ndim]
    assert len(moments) == 2 * len(gradients)
    assert {moment.device for moment in moments} == {CUDA}
    assert waits.places
    assert [f for files in waits.places for f in files if any(part in f for part in OF_PASSES)] == []


def test_an_iteration_of_the_released_config_stays_on_the_card(
    card: Card, accelerator: Any, tmp_path: Path
) -> None:
    flags = METHOD_FLAGS["adjoint_matching"]
    check(*iterate(card, accelerator, make_released_plan(tmp_path, **flags), list(SHALLOW)))


@pytest.mark.parametrize(
    "name",
    [
        *("draft", "flow_grpo", "ram", "efficient_adjoint_matching"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("deterministic_adjoint_matching", "refl", "reward_weighted_matching")
        ),
    ],
)
def test_an_iteration_of_every_method_stays_on_the_card(
    card: Card, accelerator: Any, tmp_path: Path, name: str
) -> None:
    plan = make_released_plan(tmp_path, method=name, **METHOD_FLAGS[name])
    check(*iterate(card, accelerator, plan, ["pickscore"]))


def test_every_method_but_one_is_here() -> None:
    assert METHODS.keys() - METHOD_FLAGS.keys() == {"buffered_adjoint_matching"}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_released_config_stay_on_the_card(
    card: Card, accelerator: Any, tmp_path: Path, name: str
) -> None:
    plan = make_released_plan(tmp_path, **VARIANTS[name])
    on = make_card(tmp_path, **VARIANTS[name]) if "mixed_precision" in VARIANTS[name] else card
    check(*iterate(on, accelerator, plan, ["pickscore"]))


@pytest.mark.parametrize("name", SHALLOW)
def test_the_gradient_of_every_reward_is_on_the_card(card: Card, name: str) -> None:
    with fake_cuda(card.mode):
        images = torch.rand(2, 3, 512, 512, device=CUDA).requires_grad_()
        scores = card.rewards[name](images, PROMPTS)
        assert scores.device == CUDA
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.device == CUDA
    assert gradient.shape == images.shape


@pytest.mark.parametrize("left_behind", ["latents", "target", "weight", None])
def test_a_tensor_that_is_left_on_the_cpu_is_refused(card: Card, left_behind: str | None) -> None:
    with fake_cuda(card.mode):
        rows = {"latents": torch.rand(2, 16, 64, 64), "target": torch.rand(2, 16, 64, 64)}
        rows |= {"weight": torch.ones(2), "sigmas": torch.ones(2)}
        moved = {name: row if name == left_behind else row.to(CUDA) for name, row in rows.items()}
        cond = card.model.encode_prompts(PROMPTS)
        batch = MatchingBatch(**moved, samples=torch.arange(2), cond=cond)
        with pytest.raises(RuntimeError, match="on the same device") if left_behind else nullcontext():
            matching_loss(card.model.policy, batch)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_number_that_is_read_in_a_pass_is_seen(card: Card, in_backward: bool) -> None:
    layer = card.model.network.transformer_blocks[0].attn.to_q

    def read(_: object, __: object, output: Tensor) -> None:
        if torch.is_grad_enabled() == in_backward:  # then also where checkpointing recomputes
            output.sum().item()

    handle = layer.register_forward_hook(read)
    try:
        with fake_cuda(card.mode) as waits:
            x, sigma = torch.rand(2, 16, 64, 64, device=CUDA), torch.rand(2, device=CUDA)
            cond = card.model.encode_prompts(PROMPTS)
            waits.places.clear()
            card.model.base(x, sigma, cond)
            if in_backward:
                velocity, pull = card.model.base.vjp(x, sigma, cond)
                pull(velocity)
    finally:
        handle.remove()
    assert len(waits.places) == (2 if in_backward else 1)
    assert any("/diffusers/" in file for file in waits.places[0])
    assert any("/torch/autograd/" in file for file in waits.places[-1]) == in_backward
