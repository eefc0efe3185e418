"""The model and the rewards of a run without their weights, as data-free tensors that say they are on a CPU.

Saying CPU, not meta, keeps every choice a real one: autocast, the attention kernel (which stores no scores,
on a CPU as on a GPU), where a tensor is moved. `norms_in_float32` adds what a GPU does differently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from am_diffusers.config import Config, RewardConfig
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.text_encoders import PromptEncoder
from am_diffusers.rewards import REWARDS, LearnedReward, Reward, RewardOptions
from am_diffusers.rewards.learned import Skeleton
from am_diffusers.run.fields import micro_batch
from am_diffusers.run.load import DTYPES
from am_diffusers.run.plan import Plan
from am_diffusers.system.files import asset_path
from am_diffusers.velocity import Conditioning

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pretence:
    """Model and rewards of a run, and all else of it that holds memory, without data.

    Attributes:
        model: the model with its LoRA.
        rewards: the trained rewards.
        held_out: the other rewards.
        text_bytes: size of the text encoders.
        prompt_bytes: size of one encoded prompt, in main memory.
        mode: fake mode that makes further tensors.
    """

    model: Model
    rewards: list[Reward]
    held_out: list[Reward]
    text_bytes: int
    prompt_bytes: int
    mode: FakeTensorMode

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor without data."""
        return without_data(torch.empty(shape, dtype=dtype, device="meta"), self.mode)


def pretend(plan: Plan, *, on_gpu: bool) -> Pretence:
    """Make the model and the rewards of a run from configuration files.

    Args:
        plan: the run.
        on_gpu: cast as a GPU's autocast does.

    Raises:
        ValueError: if configuration files are missing; the message says how to get them.
    """
    config, options = plan.config, plan.config.model
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = DTYPES[options.mixed_precision]
    source = Pretrained(options.pretrained_model_name_or_path, options.revision, options.variant)
    pipe, prompts = source.skeleton(dtype), PromptsWithoutData(source, dtype, mode)
    model = Model(pipe, source.family, source=source, prompts=prompts)
    with torch.device("meta"):
        model.attach_lora(rank=options.rank, lora_alpha=options.lora_alpha, layers=options.lora_layers)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    for module in (model.network, model.vae):
        remove_data(module, mode)
    if on_gpu:
        norms_in_float32(model.network)
    rewards, held_out = (
        [_pretend_reward(reward, config, mode) for reward in some]
        for some in (config.method.rewards, plan.held_out)
    )
    text_bytes = source.text_weights() * dtype.itemsize
    shapes = prompts.shapes(options.max_sequence_length)
    prompt_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    return Pretence(model, rewards, held_out, text_bytes, prompt_bytes, mode)


def _pretend_reward(reward: RewardConfig, config: Config, mode: FakeTensorMode) -> Reward:
    kind = REWARDS[reward.name]
    if not issubclass(kind, LearnedReward):
        return kind()
    assert reward.model is not None, "`make_plan` fills in the released one"
    options = RewardOptions(
        dtype=DTYPES[reward.mixed_precision],
        batch_size=reward.batch_size or micro_batch(config.optimizer.reward_micro_batch_size),
        checkpointing=config.model.gradient_checkpointing,
    )
    made = kind.skeleton(asset_path(reward.model), revision=reward.revision, options=options)
    remove_data(made.network, mode)
    made.materialise(CPU)
    return made


class PromptsWithoutData(PromptEncoder):
    """Conditioning without data, for any prompt."""

    def __init__(self, source: Pretrained, dtype: torch.dtype, mode: FakeTensorMode) -> None:
        """Take the shapes from the model's configuration files."""
        self._source, self._dtype, self._mode = source, dtype, mode

    def shapes(self, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of an encoded prompt."""
        return self._source.family.prompt_shapes(self._source.config_of, max_sequence_length)

    def encode(
        self, prompts: Sequence[str], max_sequence_length: int, negative_prompt: str | None, batch_size: int
    ) -> Conditioning:
        """Return conditioning; the negative prompt, one row that is seen as many, counts as many."""
        parts = {}
        for prefix in [""] if negative_prompt is None else ["", "negative_"]:
            for name, shape in self.shapes(max_sequence_length).items():
                rows = torch.empty(len(prompts), *shape, dtype=self._dtype, device="meta")
                parts[prefix + name] = without_data(rows, self._mode)
        return Conditioning(tuple(prompts), **parts)


def remove_data(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the weights of a module on the meta device by tensors that say they are on a CPU."""
    for part in module.modules():
        stores: Any = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = without_data(tensor.detach(), mode)
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(empty, tensor.requires_grad) if trained else empty


def without_data(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a tensor on the meta device as one that says it is on a CPU."""
    return mode.fake_tensor_converter.from_meta_and_device(mode, tensor.to("meta"), CPU)


def weights_of(reward: Reward) -> list[Tensor]:
    """Return the weights of a reward; none of one that counts pixels."""
    return list(reward.network.parameters()) if isinstance(reward, Skeleton) else []


def norms_in_float32(module: nn.Module) -> None:
    """Cast the input of every layer norm to float32 under autocast, as a GPU does; a CPU keeps bfloat16."""

    def cast(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].float(),) if torch.is_autocast_enabled("cpu") else inputs

    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_pre_hook(cast)
