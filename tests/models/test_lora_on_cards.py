"""A LoRA is written without work of the card it is on, which may be full or broken by then."""

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from am_diffusers.models.adapters import lora_layers, scaled_weights

COPIES = {"detach", "_to_copy", "alias"}


class Recorder(TorchDispatchMode):
    """Names of the operations whose result is on a card."""

    def __init__(self):
        super().__init__()
        self.on_card = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            self.on_card.add(function._schema.name.removeprefix("aten::"))
        return result


def test_weights_come_to_the_cpu_before_they_are_multiplied():
    """On tensors of a card without data."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 6))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    (layer,) = lora_layers(get_peft_model(network, config)).values()
    with FakeTensorMode():
        for part, shape in ((layer.lora_A, (2, 4)), (layer.lora_B, (6, 2))):
            part["default"].weight = torch.nn.Parameter(torch.empty(shape, device="cuda"))
        with Recorder() as recorder:
            a, b = scaled_weights(layer)
    assert (a.device.type, b.device.type) == ("cpu", "cpu")
    assert (a.shape, b.shape) == ((2, 4), (6, 2))
    assert recorder.on_card <= COPIES
