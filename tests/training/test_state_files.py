"""Nested state through safetensors and JSON."""

import json

import pytest
import torch

from am_diffusers.training.state_files import load_state, save_state, tensor_bytes

STATE = {
    "numbers": {"a": 1, "b": 0.1 + 0.2, "c": None, "d": True, "e": "text"},
    "optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 7: {}},
    "groups": [{"betas": (0.9, 0.999), "params": [0, 1]}],
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3).bfloat16(),
    "odd name": {"$tensor": 3, "x.y": torch.zeros(1)},
}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_everything_comes_back_exactly(tmp_path):
    save_state(tmp_path, "state", STATE)
    assert_same(load_state(tmp_path, "state"), STATE)
    assert {path.name for path in tmp_path.iterdir()} == {"state.json", "state.safetensors"}


def test_views_and_shared_storage_are_saved(tmp_path):
    whole = torch.arange(6.0)
    save_state(tmp_path, "state", {"a": whole[:3], "b": whole[3:], "c": whole.view(2, 3).T})
    loaded = load_state(tmp_path, "state")
    assert torch.equal(loaded["b"], whole[3:])
    assert torch.equal(loaded["c"], whole.view(2, 3).T)


def test_one_tensor_under_two_names_is_saved(tmp_path):
    same = torch.arange(3.0)
    save_state(tmp_path, "state", {"a": same, "b": same})
    assert torch.equal(load_state(tmp_path, "state")["b"], same)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "state.x is nan"), ({1, 2}, "state.x is a set"), (len, "state.x is a")],
)
def test_what_can_not_be_saved_is_named(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        save_state(tmp_path, "state", {"x": value})


def test_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the state .*state\.json"):
        load_state(tmp_path, "state")
    save_state(tmp_path, "state", STATE)
    (tmp_path / "state.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"cannot read the state"):
        load_state(tmp_path, "state")


def test_json_holds_no_numbers_of_tensors_and_bytes_are_counted(tmp_path):
    save_state(tmp_path, "state", STATE)
    document = json.loads((tmp_path / "state.json").read_text())
    assert document["bytes"] == {"$tensor": "state.bytes"}
    assert tensor_bytes(STATE) == 4 + 6 * 4 + 5 + 3 * 2 + 4
