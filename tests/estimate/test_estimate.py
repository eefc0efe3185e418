"""The estimate of the dry run: the tracker against hand counts, the model against its formula, the report."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sd3_configs import RELEASED

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import Estimate, describe, estimate
from am_diffusers.estimate.iteration import estimable
from am_diffusers.estimate.passes import ADJOINT, LOSS, REWARD, ROLLOUT
from am_diffusers.estimate.pretend import pretend
from am_diffusers.estimate.tracker import Tracker
from am_diffusers.models.pretrained import MissingModelError, Pretrained
from am_diffusers.rewards import REWARDS, LearnedReward, RewardOptions
from am_diffusers.run.counting import count
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.micro_batches import SETTINGS
from am_diffusers.run.plan import Plan, make_plan
from am_diffusers.system.gpus import find_gpu
from finetune_runs import tiny_config, write_rewards

RELEASED_MEDIUM = Path(__file__).parents[2] / "configs/released/sd35_medium"
KIB = 1024


def meta(size: int, *, grad: bool = False) -> torch.Tensor:
    """`size` KiB without data."""
    return torch.empty(size * 256, device="meta", requires_grad=grad)


def test_the_tracker_sees_what_is_freed() -> None:
    with Tracker() as tracker:
        with tracker.phase("first"):
            a = meta(4)
            b = a + a  # 8
            c = b * b  # 12
            del a, b
        assert tracker.live == 4 * KIB
        with tracker.phase("second"):
            d = c[: len(c) // 2]  # a view
            assert tracker.live == 4 * KIB
            d = d + d  # 6
        del c, d
    assert {name: usage.peak for name, usage in tracker.phases.items()} == {
        "first": 12 * KIB,
        "second": 6 * KIB,
    }
    assert tracker.phases["second"].before == 4 * KIB
    assert tracker.live == 0


def test_the_tracker_sees_what_autograd_keeps() -> None:
    x = meta(4, grad=True)
    with Tracker() as tracker:
        assert tracker.hold([x, x.detach()]) == 4 * KIB
        y = x.exp()  # its result is kept for backward, twice over
        z = y.sin()  # its input is kept
        with tracker.phase("backward"):
            z.backward(torch.ones_like(z))
        # x, y, z, the gradient of z, cos(y) and the gradient of y; then that of x once cos(y) is freed
        assert tracker.phases["backward"].peak == 24 * KIB
        assert tracker.phases["backward"].before == 12 * KIB
        del y, z
        assert tracker.live == 8 * KIB  # x and its gradient


def test_a_replayed_cost_adds_to_what_is_held() -> None:
    with Tracker() as tracker:

        def product() -> None:
            a = torch.empty(16, 32, device="meta", dtype=torch.bfloat16)
            _ = a @ a.T

        cost = tracker.cost(product)
        assert cost.peak == 2 * (16 * 32 + 16 * 16)
        assert tracker.phases == {}
        with tracker.phase("later"), tracker.holding(1000):
            tracker.replay(cost, times=3)
    assert tracker.phases["later"].peak == 1000 + cost.peak
    assert tracker.phases["later"].flops == {torch.bfloat16: 3 * 2 * 16 * 16 * 32}
    assert tracker.live == 0


@pytest.fixture(scope="module")
def rewards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    return folder


def make_tiny_plan(model: Path, folder: Path, rewards_dir: Path, **changes: object) -> Plan:
    own = {
        "rewards": [{"name": "pickscore", "model": str(rewards_dir / "pickscore")}],
        "eval_rewards": [{"name": "hpsv2", "model": str(rewards_dir / "hpsv2")}],
        "report_to": "none",
        "dry_run": True,
    }
    config = parse_config(["--config", str(tiny_config(model, folder, **(own | changes)))])
    return make_plan(config, 1)


def estimate_tiny(model: Path, folder: Path, rewards_dir: Path, **changes: object) -> Estimate:
    plan = make_tiny_plan(model, folder, rewards_dir, **changes)
    return estimate(plan, make_accelerator(plan.config), on_gpu=False)


def transformer_flops() -> int:
    """Matrix products of one call of `conftest.tiny_pipeline`'s transformer, by hand."""
    width, image, text, layers = 32, (64 // 4 // 2) ** 2, 16 + 8, 2
    patch = 8 * 2 * 2
    embeddings = image * patch * width + text * 64 * width + (256 + width + 64 + width) * width
    attention = 4 * (image + text) * width**2 + 2 * (image + text) ** 2 * width
    block = 2 * 6 * width**2 + attention + 8 * (image + text) * width**2
    # The last block only reads the text: no output projection, no feed-forward, a third of the modulation.
    not_in_last = text * width**2 + 8 * text * width**2 + 4 * width**2
    ending = 2 * width**2 + image * width * patch
    return 2 * (embeddings + layers * block - not_in_last + ending)


def test_flops_of_the_transformer_are_those_of_its_matrix_products(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir)
    pretence = pretend(plan, on_gpu=False)
    cond = pretence.model.encode_prompts(["a", "b", "c"], max_sequence_length=8)
    x, sigma = pretence.empty(3, 8, 16, 16), pretence.empty(3)
    with Tracker() as tracker:
        cost = tracker.cost(lambda: pretence.model.base(x, sigma, cond))
    assert cost.flops == {torch.float32: 3 * transformer_flops()}


def test_an_iteration_makes_the_counted_calls(tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path) -> None:
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, rollout_micro_batch_size=3)
    found = estimate(plan, make_accelerator(plan.config), on_gpu=False)
    calls, samples = count(plan.config).calls, plan.config.optimizer.train_batch_size
    base = transformer_flops()
    step_0 = calls["base, forward"]
    policy = (found.phases[ROLLOUT].flops[torch.float32] / samples - step_0 * base) / calls["policy, forward"]
    assert base < policy < 1.5 * base  # the LoRA adds to it
    # Backward to the input alone: as many products again, and one more for attention.
    adjoint = found.phases[ADJOINT].flops[torch.float32] / samples / calls["base, forward and backward"]
    assert 1.9 * base < adjoint < 2.5 * base
    assert found.peak == max(usage.peak for usage in found.phases.values())


def test_collections_of_a_buffered_run_count_in_their_share_of_iterations(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    buffered = {"method": "buffered_adjoint_matching", "buffer_size": 8, "buffer_refresh": 2}
    found = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **buffered)
    whole = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir)
    kept = 3 * 4 * 3 * 2 * 8 * 16 * 16 * 4  # states and targets of 3 steps of 8 samples, and 4 that fall out
    assert found.resident["buffer"] == found.buffer.stored + found.buffer.falling_out == kept
    assert found.peak == whole.peak + kept
    for name, phase in whole.phases.items():
        flops, share = found.phases[name].flops.total(), 2 if name in (ROLLOUT, ADJOINT, REWARD) else 1
        assert flops == phase.flops.total() // share, name


def test_a_buffer_on_a_gpu_or_a_disk_is_named_and_not_in_the_devices_memory(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    buffered = {"method": "buffered_adjoint_matching", "buffer_size": 8}
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, **buffered, gpu="h100")
    assert "buffer" not in estimate(plan, make_accelerator(plan.config), on_gpu=True).resident
    assert "# " + "  buffer, at --buffer_storage: 0.00 GiB, and 0.00 GiB of drawn rows" in describe(
        plan, make_accelerator(plan.config)
    )
    disk = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **buffered, buffer_storage="disk")
    assert "buffer" not in disk.resident


RELATIVES = {
    "deterministic_adjoint_matching": {"truncate_steps": 3},
    "draft": {"draft_steps": 2},
    "efficient_adjoint_matching": {"num_inference_steps": 20, "eam_ode_steps": 3},
    "flow_grpo": {"samples_per_prompt": 2, "grpo_passes": 2},
    "ram": {"samples_per_prompt": 2},
    "refl": {"refl_last_steps": 1},
    "reward_weighted_matching": {"samples_per_prompt": 2},
}


@pytest.mark.parametrize("name", RELATIVES)
def test_an_iteration_of_every_method_makes_the_counted_calls(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path, name: str
) -> None:
    """FLOPs of the rollout and the sweep: between 1 and 1.5 times those of the base's calls, for the LoRA."""
    changes = {"method": name, "eval_prompts": None, "eval_rewards": None} | RELATIVES[name]
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, **changes)
    found = estimate(plan, make_accelerator(plan.config), on_gpu=False)
    calls, samples = count(plan.config).calls, plan.config.optimizer.train_batch_size
    sweeps = calls.pop("base, forward and backward", 0)
    rest = sum(
        number for kind, number in calls.items() if not kind.startswith("policy, forward and backward")
    )
    flops = {phase: usage.flops[torch.float32] / samples for phase, usage in found.phases.items()}
    assert transformer_flops() * rest <= flops[ROLLOUT] < 1.5 * transformer_flops() * rest
    assert 1.9 * transformer_flops() * sweeps <= flops.get(ADJOINT, 0) <= 2.5 * transformer_flops() * sweeps
    in_the_loss = calls["policy, forward and backward of the loss"]
    assert flops[LOSS] > 2 * transformer_flops() * in_the_loss  # frozen weights have no gradient
    assert (REWARD in flops) == (name not in ("draft", "refl"))
    assert found.peak > sum(found.resident.values())


def test_the_main_process_estimates_alone(tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path) -> None:
    """The others of a launched dry run have nothing to do: an exchange would wait for ever."""
    changes = {"method": "deterministic_adjoint_matching", "eval_prompts": None, "eval_rewards": None}
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, **changes)
    one_of_two = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, device=torch.device("cpu")
    )
    assert estimate(replace(plan, num_processes=2), one_of_two, on_gpu=False).peak > 0  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "phase"),
    [
        ("ram", "reward_micro_batch_size", REWARD),
        ("flow_grpo", "loss_micro_batch_size", LOSS),
        ("draft", "reward_micro_batch_size", LOSS),
        ("refl", "loss_micro_batch_size", LOSS),
        ("efficient_adjoint_matching", "reward_micro_batch_size", REWARD),
        ("deterministic_adjoint_matching", "rollout_micro_batch_size", ADJOINT),
    ],
)
def test_micro_batches_lower_the_phases_of_every_method(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path, name: str, size: str, phase: str
) -> None:
    changes = {"method": name, "eval_prompts": None, "eval_rewards": None} | RELATIVES[name]
    peaks = [
        estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **changes, **more).phases[phase].peak
        for more in ({}, {size: 1})
    ]
    assert peaks[1] < 0.95 * peaks[0]


def test_rewards_that_count_pixels_cost_their_pictures(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    changes = {"method": "ram", "samples_per_prompt": 2, "rewards": [{"name": "jpeg_size"}]}
    changes |= {"eval_prompts": None, "eval_rewards": None}
    found = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **changes)
    assert found.phases[REWARD].flops.total() > 0


def test_the_reward_is_differentiated_beside_the_graph_of_the_last_step(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    phases = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir).phases
    graph = phases[REWARD].before - phases[ADJOINT].before
    assert graph > 0.5 * (phases[ADJOINT].peak - phases[ADJOINT].before)


def test_continuations_cost_passes_and_rewards_but_no_memory(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    """They are taken one after the other: only latents wait."""
    one, four = (
        estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, tail_samples=number).phases for number in (1, 4)
    )
    assert four[REWARD].flops.total() == pytest.approx(4 * one[REWARD].flops.total(), rel=1e-9)
    passes = four[ADJOINT].flops.total() / one[ADJOINT].flops.total()
    assert 1.5 < passes < 4
    latents = (
        4 * 8 * 16 * 16 * 4
    )  # of the samples under way: adjoints of four continuations, one state and end
    for name in (ADJOINT, REWARD):
        assert four[name].peak - one[name].peak < 6 * latents < 0.1 * one[name].peak


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({"loss_micro_batch_size": 3}, LOSS),
        ({"reward_micro_batch_size": 1}, REWARD),
        ({"rollout_micro_batch_size": 1}, ADJOINT),
        ({"gradient_checkpointing": True}, ADJOINT),
        ({"mixed_precision": "bf16"}, ADJOINT),
    ],
)
def test_the_named_knobs_lower_their_phase(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path, changes: dict[str, object], phase: str
) -> None:
    lower = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **changes).phases[phase]
    before = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir).phases[phase]
    assert lower.peak < 0.9 * before.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"adjoint": "full", "loss_steps": 2, "free_text_encoders": False},
        {"rollout_guidance_scale": 2.0, "eval_guidance_scale": 2.0, "lora_layers": ["attn.to_q"]},
        {"divergence": "forward_kl", "reward_smoothing_std": 0.1, "reward_clip_quantile": 0.5},
        {"use_ema": True, "optimizer": "prodigy", "learning_rate": 1.0, "mixed_precision": "fp16"},
        {name: "auto" for name in SETTINGS},
        {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None},
        {"rewards": [{"name": "image_reward"}, {"name": "aesthetic", "mixed_precision": "bf16"}]},
        {"rewards": [{"name": "imagenet_class"}, {"name": "ocr"}]},
    ],
)
def test_every_kind_of_run_is_estimated(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path, changes: dict[str, object]
) -> None:
    found = estimate_tiny(tiny_sd3_dir, tmp_path, rewards_dir, **changes)
    assert all(usage.peak >= usage.before > 0 for usage in found.phases.values())
    assert sum(found.resident.values()) <= found.phases[ADJOINT].before
    assert found.resident["EMA"] == changes.get("use_ema", False) * found.resident["LoRA"]
    assert min(found.phases[name].flops.total() for name in (ROLLOUT, ADJOINT, LOSS)) > 0


def test_what_a_dry_run_cannot_know_is_at_a_bound(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, loss_micro_batch_size="auto")
    eight_bit = replace(plan.config.optimizer, optimizer="adamw8bit")  # its package may not be installed
    config = estimable(replace(plan, config=replace(plan.config, optimizer=eight_bit))).config
    assert (config.optimizer.optimizer, config.optimizer.loss_micro_batch_size) == ("adamw", 1)
    assert config.shared.mask_quantile is None


def test_offloaded_trajectories_leave_the_device(
    tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path
) -> None:
    changes = {"train_batch_size": 64, "rollout_micro_batch_size": 4, "loss_micro_batch_size": 4}
    kept, offloaded = (
        make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, offload_trajectories=offload, **changes)
        for offload in (False, True)
    )
    accelerator = make_accelerator(kept.config)
    before, after = (estimate(plan, accelerator, on_gpu=True) for plan in (kept, offloaded))
    rows = 60 * 3 * 2 * 8 * 16 * 16 * 4  # states and targets of 3 steps of the samples that wait
    saved = before.phases[LOSS].before - after.phases[LOSS].before
    assert saved == pytest.approx(rows, rel=0.2)
    assert after.iteration_flops().total() == pytest.approx(before.iteration_flops().total(), rel=1e-3)


def test_the_report_names_peak_knob_and_hours(tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path) -> None:
    plan = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, gpu="rtx 4090")
    printed = describe(plan, make_accelerator(plan.config))
    assert all(line.startswith("# ") for line in printed.splitlines())
    for text in (
        "without weights or a GPU",
        "lower with ",
        "TFLOPs an iteration",
        "never measured",
        "it fits",
    ):
        assert text in printed
    assert "a bound" not in printed
    unnamed = make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, loss_micro_batch_size="auto")
    assert "estimated with loss_micro_batch_size 1, a bound" in describe(
        unnamed, make_accelerator(plan.config)
    )
    assert "name a card with --gpu (RTX 3090" in describe(unnamed, make_accelerator(unnamed.config))


def test_hours_follow_from_the_peaks_of_each_dtype() -> None:
    flops = {torch.bfloat16: int(989e12), torch.float32: int(67e12)}
    card = find_gpu("h100")
    assert card.seconds(flops, utilisation=0.5, allow_tf32=False) == pytest.approx(4)
    assert card.seconds(flops, utilisation=0.5, allow_tf32=True) == pytest.approx(2 + 2 * 67 / 494)


def test_an_unknown_card_names_the_nearest(tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"--gpu: unknown card 'A100-80': did you mean 'A100-80GB'\?"):
        make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir, gpu="A100-80")


def test_a_model_that_is_not_here_leaves_the_rest_of_the_plan(tmp_path: Path, rewards_dir: Path) -> None:
    model = Path("someone/not-downloaded")
    plan = make_tiny_plan(model, tmp_path, rewards_dir)
    assert "iterations: 4" in plan.describe()
    printed = describe(plan, make_accelerator(plan.config))
    assert "needs the model's configuration files" in printed
    assert "`hf download someone/not-downloaded`" in printed
    with pytest.raises(MissingModelError, match="hf download"):
        make_tiny_plan(model, tmp_path, rewards_dir, dry_run=False)


@pytest.mark.parametrize(
    ("name", "size"), [("pickscore", 986_109_441), ("hpsv2", 986_109_441), ("image_reward", 446_206_689)]
)
def test_skeletons_of_released_rewards_have_the_published_size(name: str, size: int) -> None:
    kind = REWARDS[name]
    assert issubclass(kind, LearnedReward)
    made = kind.skeleton(kind.released, revision=None, options=RewardOptions())
    assert sum(parameter.numel() for parameter in made.network.parameters()) == size


def test_the_released_medium_model_is_that_of_the_other_tests() -> None:
    config = json.loads((RELEASED_MEDIUM / "transformer/config.json").read_text())
    expected = RELEASED["sd3.5-medium"]
    assert {key: config[key] for key in expected} == expected | {
        "dual_attention_layers": list(expected["dual_attention_layers"])
    }
    source = Pretrained(str(RELEASED_MEDIUM))
    assert source.skeleton(torch.bfloat16).transformer.dtype == torch.bfloat16
    # CLIP-L 123.65, bigG 694.66 and T5-XXL's encoder 4762.31 million
    assert round(source.text_weights() / 1e6) == 5581
    assert source.family.prompt_shapes(source.config_of, 256)["embeddings"] == (77 + 256, 4096)


def test_nothing_is_allocated(tiny_sd3_dir: Path, tmp_path: Path, rewards_dir: Path) -> None:
    pretence = pretend(make_tiny_plan(tiny_sd3_dir, tmp_path, rewards_dir), on_gpu=False)
    tensors = [*pretence.model.network.parameters(), *pretence.model.vae.parameters()]
    assert all(tensor.untyped_storage().device.type == "meta" for tensor in tensors)
    assert all(tensor.device.type == "cpu" for tensor in tensors)
