"""What every reward promises, whatever it measures: one row a reward in `reward_cases.CASES`."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from am_diffusers.config import RewardConfig
from am_diffusers.estimate.pretend import remove_data, without_data
from am_diffusers.rewards import REWARDS, ImageFeatures, LearnedReward, Reward, RewardOptions
from am_diffusers.run.checked_rewards import resolve_reward
from reward_cases import CASES, LEARNED, PROMPTS, SHIPPED, SMALL, learned, make, place_of
from reward_models import CAPTIONS, SIZE, edit_weights
from reward_pictures import pictures, random_images

Load = Callable[..., Reward]


@pytest.fixture(params=REWARDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def load(name: str, small_rewards: Path) -> Load:
    """Builds the reward `name` with options."""
    return lambda **options: make(name, small_rewards, **options)


@pytest.fixture
def copied(name: str, small_rewards: Path, tmp_path: Path) -> Path:
    """Folder of the reward `name` that the test may spoil."""
    return Path(shutil.copytree(small_rewards / name, tmp_path / name))


def some(name: str) -> tuple[Tensor, list[str]]:
    """Images that the reward can score, in its first shape, and their prompts."""
    case = CASES[name]
    return case.images(case.many, *case.shapes[0], torch.float32), list(case.prompts[: case.many])


def gradient_of(reward: Reward, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(reward(images, PROMPTS[: len(images)]).sum(), images)[0]


def test_every_reward_has_a_row_and_its_own_name() -> None:
    assert set(CASES) == set(REWARDS), "a new reward needs a row in tests/reward_cases.py"
    assert {name: kind.name for name, kind in REWARDS.items()} == {name: name for name in REWARDS}


def test_a_score_an_image(name: str, load: Load) -> None:
    scores = load()(*some(name))
    assert scores.shape == (CASES[name].many,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_scores_differ_between_images(name: str, load: Load) -> None:
    images, prompts = some(name)
    assert load()(images, prompts[:1] * len(images)).std() > 0


def test_a_score_depends_on_no_other_row(name: str, load: Load) -> None:
    reward, (images, prompts), case = load(), some(name), CASES[name]
    scores = reward(images, prompts)
    alone = torch.cat([reward(images[row : row + 1], [prompt]) for row, prompt in enumerate(prompts)])
    assert torch.allclose(alone, scores, rtol=case.rtol, atol=case.atol)
    back = reward(images.flip(0), prompts[::-1])
    assert torch.allclose(back.flip(0), scores, rtol=case.rtol, atol=case.atol)


def test_gradient_is_that_of_the_score(name: str, load: Load) -> None:
    reward, case = load(dtype=torch.float64), CASES[name]
    if not reward.differentiable:
        images, prompts = some(name)
        assert not reward(images.requires_grad_(), prompts).requires_grad
        return
    prompts, generator = PROMPTS[: case.count], torch.Generator().manual_seed(1)
    for height, width in case.shapes:
        images = case.images(case.count, height, width, torch.float64)
        gradient = gradient_of(reward, images)
        for _ in range(case.directions):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            above, below = (reward(images + s * case.step * direction, prompts).sum() for s in (1, -1))
            expected = ((above - below) / (2 * case.step)).item()
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=case.accuracy, abs=1e-8)


BAD_IMAGES = {
    "one image": (torch.rand(3, 8, 8), r"\(B, 3, H, W\).*\(3, 8, 8\)"),
    "three dimensions": (torch.rand(2, 3, 8), r"\(B, 3, H, W\).*\(2, 3, 8\)"),
    "channels last": (torch.rand(2, 8, 8, 3), r"\(B, 3, H, W\)"),
    "bytes": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating-point"),
    "empty": (torch.zeros(2, 3, 0, 8), r"\(B, 3, H, W\)"),
    "minus one to one": (torch.rand(2, 3, 8, 8) - 0.5, r"in \[0, 1\], got \[-0\."),
    "up to 255": (torch.full((2, 3, 8, 8), 255.0), r"in \[0, 1\], got \[255, 255\]"),
    "NaN": (torch.tensor([0.5, math.nan]).view(2, 1, 1, 1).expand(2, 3, 8, 8), r"rows \[1\]"),
    "infinite": (torch.tensor([math.inf, 0.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8), r"rows \[0\]"),
}
BAD_PROMPTS = {
    "one string": ("ab", "one string"),
    "too few": (["a"], "1 prompts for 2 images"),
    "empty": (["a", "  "], r"empty ones in rows \[1\]"),
}


def test_bad_images_and_prompts_are_refused(load: Load) -> None:
    reward = load()
    for images, message in BAD_IMAGES.values():
        with pytest.raises(ValueError, match=message):
            reward(images, CASES[reward.name].prompts[:2])
        if isinstance(reward, ImageFeatures):
            with pytest.raises(ValueError, match=message):
                reward.image_features(images)
    for prompts, message in BAD_PROMPTS.values():
        with pytest.raises(ValueError, match=message):
            reward(random_images(2, 8, 8), prompts)


@pytest.mark.parametrize("name", LEARNED)
def test_official_mode_has_no_gradient(name: str, load: Load) -> None:
    reward = load(mode="official")
    assert not reward.differentiable
    images, prompts = some(name)
    scores = reward(images.requires_grad_(), prompts)
    assert scores.shape == (len(images),)
    assert not scores.requires_grad


@pytest.mark.parametrize("name", SMALL)
def test_tensor_modes_score_like_the_official_one(load: Load) -> None:
    """Differences relative to the spread between images (measured: 1.4 % and 0.1 % for PickScore)."""
    images, prompts = pictures(32, 96, 128), [CAPTIONS[0]] * 32
    official = load(mode="official")(images, prompts)
    for mode, limit in (("differentiable", 0.03), ("rounded", 0.005)):
        scores = load(mode=mode)(images, prompts)
        assert ((scores - official).square().mean().sqrt() / official.std()).item() < limit


@pytest.mark.parametrize("name", SMALL)
def test_rounding_passes_gradients_straight_through(load: Load) -> None:
    images = random_images(2, 48, 64)
    rounded, plain = gradient_of(load(mode="rounded"), images), gradient_of(load(), images)
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), plain.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", LEARNED)
def test_micro_batches_change_nothing(name: str, load: Load) -> None:
    (images, prompts), case = some(name), CASES[name]
    expected = load()(images.requires_grad_(), prompts)
    gradient = torch.autograd.grad(expected.sum(), images)[0]
    for checkpointing in (False, True):
        scores = load(batch_size=case.many - 1, checkpointing=checkpointing)(images, prompts)
        assert torch.allclose(scores, expected, rtol=case.rtol, atol=case.atol)
        difference = torch.autograd.grad(scores.sum(), images)[0] - gradient
        assert difference.abs().max() < max(case.rtol, case.atol) * gradient.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_holds_little(load: Load) -> None:
    images = random_images(4, SIZE, SIZE)
    plain, checkpointed = (
        saved_numbers(load(batch_size=1, checkpointing=on), images) for on in (False, True)
    )
    assert plain > 4 * images.numel()
    assert checkpointed <= images.numel() + 10 * len(images) * 16  # the inputs and a few of the features


def saved_numbers(reward: Reward, images: Tensor) -> int:
    """Count the numbers that autograd holds after scoring, model weights left out."""
    assert isinstance(reward, LearnedReward)
    saved: dict[int, int] = {}
    weights = {id(parameter.untyped_storage()) for parameter in reward.network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor.untyped_storage()) not in weights:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reward(images.clone().requires_grad_(), CAPTIONS[: len(images)])
    return sum(saved.values())


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_towers_score_in_float32(load: Load) -> None:
    images = random_images(3, 48, 64)
    scores = load(dtype=torch.bfloat16)(images, CAPTIONS[:3])
    assert scores.dtype == torch.float32
    full = load()(images, CAPTIONS[:3])
    assert torch.allclose(scores, full, atol=max(0.01, 0.05 * full.abs().max().item()))
    assert not torch.equal(scores, full)


@pytest.mark.parametrize("name", LEARNED)
def test_weights_are_frozen(name: str, load: Load) -> None:
    reward = load()
    assert isinstance(reward, LearnedReward)
    images, prompts = some(name)
    reward(images.requires_grad_(), prompts).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in reward.network.parameters())
    assert not any(module.training for module in reward.network.modules())


@pytest.mark.parametrize("name", [name for name, kind in REWARDS.items() if hasattr(kind, "image_features")])
def test_image_features_have_length_one(name: str, load: Load) -> None:
    """Equal for equal images whatever the batch, and different for different ones."""
    reward, images = load(batch_size=2), random_images(3, 48, 64)
    assert isinstance(reward, ImageFeatures)
    features = reward.image_features(torch.cat([images, images[:1]]))
    assert torch.allclose(features.norm(dim=-1), torch.ones(4))
    assert torch.allclose(features[3], features[0], atol=1e-6)
    assert not torch.allclose(features[1], features[0], atol=1e-3)


@pytest.mark.parametrize("name", LEARNED)
def test_the_skeleton_is_the_reward_without_its_weights(name: str, load: Load, small_rewards: Path) -> None:
    options = RewardOptions(dtype=torch.bfloat16)
    made = learned(name).skeleton(place_of(name, small_rewards), revision=None, options=options)
    loaded = load(dtype=torch.bfloat16)
    assert isinstance(loaded, LearnedReward)
    assert made.name == name
    assert tensors(made.network) == tensors(loaded.network)
    assert {value.device.type for value in made.network.state_dict().values()} == {"meta"}
    images, prompts = some(name)
    pixels = made._pixels(images)
    assert pixels.shape == loaded._pixels(images).shape
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    remove_data(made.network, mode)
    assert made._score(without_data(pixels.bfloat16(), mode), prompts).shape == (len(images),)


def tensors(network: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of all parameters and buffers, by name."""
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: (tuple(value.shape), value.nbytes) for name, value in named.items()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("edit", ["drop", "add", "resize"])
def test_other_weights_are_refused(name: str, copied: Path, edit: str) -> None:
    damage = CASES[name].damage
    assert damage is not None
    key = getattr(damage, edit)
    edit_weights(copied / damage.file, **{edit: key})
    messages = {
        "drop": f"1 missing, e.g. {key}",
        "add": f"1 unexpected, e.g. {key}",
        "resize": damage.message,
    }
    with pytest.raises(ValueError, match=messages[edit]):
        learned(name).from_pretrained(copied)


@pytest.mark.parametrize("name", SMALL)
def test_damaged_weights_are_named(name: str, copied: Path) -> None:
    """A Git LFS pointer in place of the weights is the usual damage."""
    damage = CASES[name].damage
    assert damage is not None
    (copied / damage.file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"damaged.*hf download"):
        learned(name).from_pretrained(copied)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "path"), [(name, path) for name in SMALL for path in CASES[name].nowhere])
def test_missing_weights_name_the_download(name: str, path: str, small_rewards: Path) -> None:
    beside = {key: small_rewards / name / file for key, file in (CASES[name].beside or {}).items()}
    with pytest.raises(ValueError, match=CASES[name].missing):
        learned(name).from_pretrained(path, **beside)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("am_diffusers.rewards.parts.packaged.find_spec", lambda name: None)
    kind = learned(name)
    for call in (lambda: kind.from_pretrained(kind.released), lambda: resolve_reward(RewardConfig(name))):
        with pytest.raises(ValueError, match=CASES[name].missing):
            call()


@pytest.mark.parametrize(("option", "value"), [("mode", "exact"), ("batch_size", 0)])
def test_bad_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"expected.*{option}"):
        RewardOptions(**{option: value})  # pyright: ignore[reportArgumentType]
