"""A fine-tuning method, as the trainer sees it.

    collected = method.collect(cond, generators, shared)           no gradient
    for example in collected.examples.split(n):                    micro-batches of rows
        loss, metrics = method.loss(example); loss.backward()      gradients add up

The sum of the losses over all examples of all ranks is the iteration's loss: its mean over kept rows
is taken in `collect`. The trainer undoes any averaging over ranks that its wrapper does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from am_diffusers.methods.parts.kept import KeptBytes, PartShare
from am_diffusers.methods.parts.own_settings import NoSettings
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.noise import LatentSpec
from am_diffusers.velocity import Conditioning


class Examples(Protocol):
    """Training rows of a method, for instance a `MatchingBatch`."""

    @property
    def weight(self) -> Tensor:
        """Factor of each row in the loss, (N,); a batch whose rows all have 0 adds nothing."""
        ...

    def __len__(self) -> int: ...

    def split(self: "E", micro_batch_size: int, /) -> "Sequence[E]":
        """Consecutive batches of at most `micro_batch_size` rows."""
        ...

    def describe(self) -> str:
        """Describe the rows in one line, for an error message: prompts, noise levels."""
        ...


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True, eq=False)
class Collected(Generic[E]):
    """Training rows of one iteration on this rank.

    Attributes:
        examples: rows to train on; every rank has the same number.
        rewards: rewards of this rank's samples, (B,); (0,) without a rollout, or if only the loss ends it.
        metrics: numbers to log, already over all ranks; those of rollouts are left out where there was none.
        warnings: what a user should know now, the same on all ranks.
    """

    examples: E
    rewards: Tensor
    metrics: dict[str, float]
    warnings: Sequence[str] = ()


class Method(ABC, Generic[E]):
    """A fine-tuning method: a way to make training rows and the loss of a row.

    Args:
        around: fields, reward, noise.
        shared: flags of the rollout, the targets and the reward's gradient; those that `reads` names and
            `FOR_ALL` are read.
        own: the method's own flags, of its class `Settings`; by default their defaults.

    Attributes:
        title: name for people.
        paper: number of the paper on arXiv.
        Settings: class of the method's own flags: a dataclass whose fields have a default and a sentence.
        reads: names of the `SharedSettings` that it reads beside `FOR_ALL`, and "offload_trajectories".
        needs_reward_gradient: whether the reward must be differentiable.
        compares_samples: whether rewards of several samples of a prompt are compared, so that
            `samples_per_prompt` must be at least 2.
        aims_at_tilt: whether its optimum is p_base * exp(reward_scale * reward), with settings that allow it.
        guided_everywhere: whether guidance of the rollout belongs to policy and base alike.
        finds_sizes: whether micro-batches of size `auto` can be found for it.
        decisive: own flags that the targets of stored rows depend on.
        free: own flags that change where a run works and not what it learns.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type] = NoSettings
    reads: ClassVar[tuple[str, ...]] = ()
    needs_reward_gradient: ClassVar[bool]
    compares_samples: ClassVar[bool] = False
    aims_at_tilt: ClassVar[bool] = False
    guided_everywhere: ClassVar[bool] = False
    finds_sizes: ClassVar[bool] = False
    decisive: ClassVar[tuple[str, ...]] = ()
    free: ClassVar[tuple[str, ...]] = ()

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        self.around, self.shared = around, shared
        self.own = self.Settings() if own is None else own
        self.policy, self.base = around.policy, around.base
        self.latents, self.gather, self.sizes = around.latents, around.gather, around.sizes

    @classmethod
    @abstractmethod
    def law(cls, shared: SharedSettings, own: Any) -> str:
        """Say which law a run with these flags aims at: the end of a sentence of the model card."""

    @classmethod
    def cautions(cls, shared: SharedSettings, own: Any) -> list[str]:
        """Say what a user should know of these flags before the run, a sentence each."""
        return []

    @classmethod
    def dearest(cls, own: Any) -> Any:
        """Return own flags whose first iteration needs as much as any iteration with the given ones."""
        return own

    @property
    def period(self) -> int:
        """Iterations from one rollout to the next."""
        return 1

    @property
    def collector(self) -> "Method":
        """The method that rolls out: itself, but for one that stores another's rows."""
        return self

    def kept_bytes(self, rows: int, latents: LatentSpec) -> KeptBytes:
        """Return how much is kept from iteration to iteration, with `rows` rows a sample."""
        return KeptBytes()

    def check_size(self, rows: int, latents: LatentSpec) -> None:
        """Refuse to keep more than the user allows.

        Raises:
            ValueError: with the size and what makes it smaller.
        """

    @abstractmethod
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[E]:
        """Training rows of this rank's samples, without gradient.

        Args:
            cond: conditioning of the B samples of this rank.
            generators: one CPU generator per sample, for its noise (`rollout.generators_for`).
            shared: CPU generator in the same state on every rank, for what all samples share
                (`rollout.generator_for(seed, iteration, "shared")`).
        """

    @abstractmethod
    def loss(self, example: E) -> tuple[Tensor, dict[str, float]]:
        """Loss of some rows, differentiable in the policy's parameters, and numbers to log: sums as well."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart and is the same on all ranks, JSON-serialisable or tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def snapshot(self) -> Callable[[Exception | None], None]:
        """Return a function that, told the error, brings the method back to where it is now.

        An iteration that is to be done again as it was, such as one that a signal ended, must find the method
        exactly as now; after a `NonFiniteError` a method may drop what would lead there again.
        """
        state, local = self.state_dict(), self.local_state_dict()

        def roll_back(error: Exception | None) -> None:
            self.load_state_dict(state)
            self.load_local_state_dicts([local], PartShare())

        return roll_back

    def local_state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart and differs between ranks; {} for most methods.

        A snapshot that later calls don't change: references to tensors that are never written to will do.
        """
        return {}

    def load_local_state_dicts(self, states: Sequence[dict[str, Any]], share: PartShare) -> None:
        """Restores this rank's part of what all ranks returned, of which there may have been more or fewer.

        Args:
            states: what `local_state_dict` returned on the ranks `share.needed`, in this order.
            share: which of their samples are this rank's.

        Raises:
            ValueError: if the samples can't be shared by so many ranks.
        """
