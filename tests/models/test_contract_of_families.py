"""What every family of FAMILIES keeps: the pipeline's images, exact fields, a LoRA that loads."""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_diffusers.models import FAMILIES
from am_diffusers.models.adapters import adapters, lora_layers
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.rollout import sample
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import GuidedField
from families import CASES, PROMPTS, Case, point, redraw_lora, strong_lora
from pull_backs import vjp


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def source(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """The folder of the family's tiny pipeline."""
    folder = tmp_path_factory.mktemp("family")
    case.pipeline().save_pretrained(folder)
    return Pretrained(str(folder))


@pytest.fixture
def model(source: Pretrained) -> Model:
    return Model.from_pretrained(source)


class CountProducts(TorchDispatchMode):
    """Counts matrix products, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ode_sampling_gives_the_pipelines_picture(model: Model, guidance_scale: float) -> None:
    strong_lora(model)
    noise = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    expected = model.pipeline()(
        PROMPTS,
        negative_prompt=["green", "green"],
        latents=noise,
        num_inference_steps=4,
        output_type="pt",
        **model.family.call(guidance_scale, 8),
    ).images
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8, negative_prompt="green")
    field = GuidedField(model.policy, guidance_scale) if guidance_scale > 1 else model.policy
    images = model.decode(sample(field, ode_euler(model.ode_sigmas(4, noise.shape[1:])), cond, noise))
    assert (images - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().mean() > 0.05


def test_each_text_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode_prompt = model.pipeline().encode_prompt

    def counting(prompt: list[str], **rest: object) -> object:
        seen.extend(prompt)
        return encode_prompt(prompt, **rest)

    monkeypatch.setattr(model.pipeline(), "encode_prompt", counting)
    for _ in range(2):
        model.encode_prompts(["a fox", "a clock", "a fox"], max_sequence_length=8, negative_prompt="")
    assert seen == ["a fox", "a clock", ""]
    model.encode_prompts(["a fox"], max_sequence_length=4)
    assert seen[3:] == ["a fox"]


@pytest.mark.parametrize("stochastic", [False, True])
def test_noise_levels_go_from_noise_to_data(model: Model, stochastic: bool) -> None:
    shape = model.latent_shape(64, 64)
    sigmas = (model.sde_sigmas if stochastic else model.ode_sigmas)(5, shape)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (6,)
    assert sigmas[0] == pytest.approx(1, abs=1e-3)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_configurations_tell_what_the_weights_are(model: Model, source: Pretrained) -> None:
    """What is said before weights are loaded, and what an estimate runs."""
    skeleton = Model(source.skeleton(torch.float32), source.family, source=source)
    for name in ("network", "vae"):
        shapes = [
            {key: value.shape for key, value in getattr(made, name).state_dict().items()}
            for made in (model, skeleton)
        ]
        assert shapes[0] == shapes[1]
    assert source.family.latent_shape(source.config_of, 64, 64) == model.latent_shape(64, 64)
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    for name, shape in source.family.prompt_shapes(source.config_of, 8).items():
        assert getattr(cond, name).shape == (2, *shape)
    encoders = [getattr(model.pipeline(), name) for name in source.family.text_components]
    modules = [encoder for encoder in encoders if isinstance(encoder, torch.nn.Module)]
    assert source.text_weights() == sum(p.numel() for module in modules for p in module.parameters()) > 0


def test_sizes_that_cannot_be_made_are_refused(model: Model) -> None:
    multiple = model.family.multiple(model.config_of)
    model.latent_shape(multiple, 2 * multiple)
    model.latent_shape(side := model.family.resolution(model.config_of), side)
    with pytest.raises(ValueError, match=f"{multiple}"):
        model.latent_shape(multiple, 2 * multiple + 1)


@pytest.mark.parametrize("field", ["policy", "base"])
def test_vjp_is_autograd_through_the_transformer(
    case: Case, model: Model, field: str, source: Pretrained
) -> None:
    x, sigma, cond = point(strong_lora(model))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    # The base is held against a transformer that never had a LoRA.
    plain = model if field == "policy" else Model.from_pretrained(source)
    leaf = x.clone().requires_grad_()
    expected = case.direct(plain.network, leaf, sigma, cond)
    (gradient,) = torch.autograd.grad(expected, leaf, cotangent)
    with torch.no_grad():
        velocity, product = vjp(getattr(model, field), x, sigma, cond, cotangent)
    torch.testing.assert_close(velocity, expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(product, gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(getattr(model, field)(x, sigma, cond), expected, atol=1e-6, rtol=1e-6)
    assert not velocity.requires_grad
    assert not product.requires_grad


def test_vjp_matches_central_differences_in_float64(source: Pretrained) -> None:
    model = strong_lora(Model.from_pretrained(source, weight_dtype=torch.float64))
    for parameter in model.lora_parameters().values():
        parameter.data = parameter.data.double()
    x, sigma, cond = point(model)
    x = x.double()
    generator = torch.Generator().manual_seed(3)
    cotangent, direction = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    for field in (model.policy, model.base):
        _, product = vjp(field, x, sigma, cond, cotangent)
        with torch.no_grad():
            # Fourth order with a wide step: SD3's RMS norm rounds to float32 inside a float64 model.
            step = 1e-2 * direction
            by = {n: (field(x + n * step, sigma, cond) * cotangent).sum() for n in (-2, -1, 1, 2)}
        expected = (8 * (by[1] - by[-1]) - (by[2] - by[-2])) / 12e-2
        torch.testing.assert_close((product * direction).sum(), expected, atol=0, rtol=1e-4)


def test_cotangent_may_depend_on_the_velocity(model: Model) -> None:
    x, sigma, cond = point(strong_lora(model))
    seen = []

    def cotangent(velocity: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(velocity)
        # A field called in here must neither disturb nor be disturbed by the pass that is under way.
        return 2 * velocity + model.policy(x, sigma, cond)

    with torch.no_grad():
        velocity, product = vjp(model.base, x, sigma, cond, cotangent)
        vector = 2 * velocity + model.policy(x, sigma, cond)
    expected = vjp(model.base, x, sigma, cond, vector)
    assert len(seen) == 1
    torch.testing.assert_close((velocity, product), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[0], velocity, atol=0, rtol=0)


@pytest.mark.parametrize("field", ["policy", "base"])
def test_gradient_checkpointing_changes_no_vjp(model: Model, field: str) -> None:
    x, sigma, cond = point(strong_lora(model))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    plain = vjp(getattr(model, field), x, sigma, cond, cotangent)
    other = vjp((model.base if field == "policy" else model.policy), x, sigma, cond, cotangent)
    model.enable_gradient_checkpointing()
    checkpointed = vjp(getattr(model, field), x, sigma, cond, cotangent)
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-6)
    assert (checkpointed[1] - other[1]).abs().max() > 0.1, "the LoRA is too weak for this test to fail"


def test_gradient_checkpointing_changes_no_lora_gradient(model: Model) -> None:
    x, sigma, cond = point(strong_lora(model))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        velocity = model.policy(x, sigma, cond)
        model.base(x, sigma, cond)  # between forward and backward of the policy
        vjp(model.base, x, sigma, cond, velocity.detach())
        gradients.append(torch.autograd.grad(velocity.square().sum(), [*model.lora_parameters().values()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_base_does_not_depend_on_the_lora(model: Model) -> None:
    x, sigma, cond = point(model)
    before = model.base(x, sigma, cond)
    assert torch.equal(model.policy(x, sigma, cond), before)
    products = []
    strong_lora(model)
    for seed in (0, 1):
        redraw_lora(model, seed)
        products.append(vjp(model.base, x, sigma, cond, x))
        assert (model.policy(x, sigma, cond) - before).std() > 0.1
    for velocity, product in products:
        assert torch.equal(velocity, before)
        assert torch.equal(product, products[0][1])


def test_vjp_touches_no_lora_weight(model: Model) -> None:
    x, sigma, cond = point(strong_lora(model))
    products = []
    for trainable in (True, False):
        for parameter in model.lora_parameters().values():
            parameter.requires_grad_(trainable)
        with CountProducts() as counter:
            vjp(model.policy, x, sigma, cond, x)
        products.append(counter.count)
    assert products[0] == products[1] > 0
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_base_call_records_no_graph(model: Model) -> None:
    x, sigma, cond = point(strong_lora(model))
    assert not model.base(x.requires_grad_(), sigma, cond).requires_grad
    assert model.policy(x, sigma, cond).requires_grad


def test_adapter_switch_keeps_requires_grad_and_survives_errors(model: Model) -> None:
    strong_lora(model)
    layers = lora_layers(model.network).values()
    frozen, *others = model.lora_parameters().values()
    frozen.requires_grad_(False)
    with adapters(model.switches, enabled=False):
        assert all(layer.disable_adapters for layer in layers)
        assert [p.requires_grad for p in (frozen, *others)] == [False] + [True] * len(others)
        with contextlib.suppress(KeyError), adapters(model.switches, enabled=True):
            assert not any(layer.disable_adapters for layer in layers)
            raise KeyError
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert [p.requires_grad for p in (frozen, *others)] == [False] + [True] * len(others)


def test_training_step_changes_the_lora_alone(case: Case, model: Model) -> None:
    x, sigma, cond = point(strong_lora(model))
    frozen = {n: p.clone() for n, p in model.network.named_parameters() if ".lora_" not in n}
    base, policy = model.base(x, sigma, cond), model.policy(x, sigma, cond)
    optimizer = torch.optim.AdamW(model.lora_parameters().values(), lr=1e-2)
    policy.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.lora_parameters().values())
    dead = [n for n, p in model.network.named_parameters() if p.grad is not None and not p.grad.any()]
    assert all(case.dead in name for name in dead)
    optimizer.step()
    assert model.policy(x, sigma, cond).square().mean() < policy.square().mean()
    assert torch.equal(model.base(x, sigma, cond), base)
    for name, parameter in model.network.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_bfloat16_weights_with_a_float32_lora(model: Model, source: Pretrained, checkpointed: bool) -> None:
    half = strong_lora(Model.from_pretrained(source, weight_dtype=torch.bfloat16))
    if checkpointed:
        half.enable_gradient_checkpointing()
    assert {p.dtype for n, p in half.network.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in half.lora_parameters().values()} == {torch.float32}
    x, sigma, cond = point(strong_lora(model))
    half_cond = half.encode_prompts(PROMPTS, max_sequence_length=8)
    for name in ("policy", "base"):
        exact = vjp(getattr(model, name), x, sigma, cond, x)
        rough = vjp(getattr(half, name), x, sigma, half_cond, x)
        for got, want in zip(rough, exact, strict=True):
            assert got.dtype == torch.float32
            assert (got - want).norm() < 0.05 * want.norm()
    half.policy(x, sigma, half_cond).square().sum().backward()
    model.policy(x, sigma, cond).square().sum().backward()
    for got, want in zip(half.lora_parameters().values(), model.lora_parameters().values(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad - want.grad).norm() <= 0.1 * want.grad.norm()


# Rank and alpha differ in both directions: an export that loses the scaling is 2x too weak or too strong.
@pytest.mark.parametrize(("rank", "lora_alpha"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_export_has_the_trained_strength_in_diffusers(
    model: Model, source: Pretrained, tmp_path: Path, rank: int, lora_alpha: int, with_metadata: bool
) -> None:
    def picture(pipe) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        call = {"height": 64, "width": 64, "num_inference_steps": 3, **model.family.call(1.0, 8)}
        return pipe("a red fox", **call, generator=generator, output_type="pt").images

    expected = picture(strong_lora(model, rank=rank, lora_alpha=lora_alpha).pipeline())
    file = model.save_lora(tmp_path)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    if not with_metadata:
        save_file(load_file(file), file, metadata={"format": "pt"})
    pipe = source.load(torch.float32)
    base = picture(pipe)
    pipe.load_lora_weights(tmp_path)
    assert (picture(pipe) - expected).abs().max() < 1e-5
    assert (expected - base).abs().mean() > 0.02
