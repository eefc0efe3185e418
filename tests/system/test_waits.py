"""Work between passes: numbers that the host reads, for which a card stops, and walks over modules."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_diffusers.methods.parts.reports import adjoint_norms, means
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.rewards.base import check_images
from am_diffusers.system import half_precision
from am_diffusers.system.half_precision import ScaledBackward, safe_scale
from families import point, strong_lora


class Operations(TorchDispatchMode):
    """Counts operations by name; a number that is read alone is a `_local_scalar_dense`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_all_statistics_are_read_at_once() -> None:
    columns = {f"adjoint_norm/{k:02d}": torch.rand(4) for k in range(1, 9)} | {"reward": torch.rand(4)}
    with Operations() as seen:
        found, norms = means(columns), adjoint_norms(columns)
    assert "_local_scalar_dense" not in seen.count
    assert found == {name: column.mean().item() for name, column in columns.items()} | {
        "reward_std": columns["reward"].std(correction=0).item()
    }
    assert norms == {k: columns[f"adjoint_norm/{k:02d}"].median().item() for k in range(1, 9)}


def test_a_check_of_images_reads_once() -> None:
    with Operations() as seen:
        check_images(torch.rand(2, 3, 8, 8))
    assert "_local_scalar_dense" not in seen.count


def test_scales_are_made_of_the_norms_alone() -> None:
    """A number that the host holds as a tensor would be copied to the card in every vjp."""
    norms = torch.rand(3)
    with Operations() as seen:
        safe_scale(norms)
    assert seen.count["frexp"] == 1
    assert not {"_to_copy", "lift_fresh"} & seen.count.keys()


@pytest.mark.parametrize(("sizes", "products"), [((1e-3, 1e-3), 0), ((1e-3, 1e3), 1)])
def test_gradients_follow_a_scale_in_one_operation(sizes: tuple[float, float], products: int) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    scaled = ScaledBackward(parameters)

    def backward(size: float) -> Tensor:
        return size * torch.stack([(p * p).sum() for p in parameters]).sum()

    scaled.backward(backward(sizes[0]), torch.ones(1))
    with Operations() as seen:
        scaled._rescale(safe_scale(2 * backward(sizes[1]).detach().abs().double().sqrt()).item())
    assert seen.count["_foreach_mul_"] == products
    assert seen.count["mul_"] == 0


def test_a_scale_that_is_no_power_of_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "safe_scale", lambda norms: 64.00001 * torch.ones_like(norms))
    with pytest.raises(AssertionError, match=r"no power of two: 64\.0000"):
        ScaledBackward([]).backward(torch.ones((), requires_grad=True), torch.ones(1))


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that walks come to."""
    names, walk = list[str](), torch.nn.Module.named_modules

    def named_modules(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        outermost = not args and not kwargs
        for name, part in walk(module, *args, **kwargs):
            if outermost:
                names.append(name)
            yield name, part

    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)
    return names


def test_a_pass_does_not_walk_over_the_modules(model: Model, visited: list[str]) -> None:
    model.attach_lora(rank=2)
    x, sigma, cond = point(model)
    model.policy(x, sigma, cond)
    visited.clear()
    model.policy(x, sigma, cond)
    velocity, pull = model.base.vjp(x, sigma, cond)
    pull(velocity)
    assert len(visited) < 20 < sum(1 for _ in model.network.modules())


def test_layers_of_a_lora_that_the_pipeline_loads_are_switched(model: Model, tmp_path: Path) -> None:
    x, sigma, cond = point(model)
    file = strong_lora(Model.from_pretrained(cast(Pretrained, model.source))).save_lora(tmp_path)
    before = model.base(x, sigma, cond)
    model.pipeline().load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.equal(model.base(x, sigma, cond), before)
    assert not torch.equal(model.policy(x, sigma, cond), before)


def test_layers_that_a_new_lora_brings_are_switched(model: Model) -> None:
    x, sigma, cond = point(model)
    model.attach_lora(rank=2)
    before = len(model.switches)
    model.base(x, sigma, cond)
    model.unload_lora()
    assert model.switches == []
    model.attach_lora(rank=2, layers=["attn.to_q"])
    assert 0 < len(model.switches) < before
