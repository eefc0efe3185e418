"""The network of a control or corrector, its optimizer, and the average of its weights that is followed.

    w(x, s) = net(x / c_in, waves of x, features of s) / c_out
    c_in^2  = nu^2 s^2 + spread^2,    c_out^2 = nu^2 s^2 + width^2

so that at the source and at the target the net's input and output are of size 1: a control is of size 1 / nu
there and 1 / width here. Waves (sines and cosines) down to the narrowest mode let a small net tell modes
apart. Its last layer begins at 0: the control begins as none.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.noise import generator_for
from am_diffusers.samplers.energies.base import Energy
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.velocity import CallableField, Conditioning

MAX_WAVES = 6
MAX_GRADIENT = 1.0
PERIODS = 4


class ControlNetwork(nn.Module):
    """A multilayer perceptron with the scales above.

    Args:
        dimension: coordinates of a state.
        hidden: width of its three hidden layers.
        nu: strength of the reference.
        spread: standard deviation of a coordinate of the target.
        width: standard deviation of its narrowest mode.
    """

    def __init__(self, dimension: int, hidden: int, *, nu: float, spread: float, width: float) -> None:
        super().__init__()
        self.nu, self.spread, self.width = nu, spread, width
        self.waves = min(MAX_WAVES, max(0, math.ceil(math.log2(spread / width))))
        inputs = dimension * (1 + 2 * self.waves) + 2 + 2 * PERIODS
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dimension),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Control at states (B, D) and levels s (B,), (B, D)."""
        noise = (self.nu * level.unsqueeze(1)).square()
        scaled = x / (noise + self.spread**2).sqrt()
        time = 0.5 * ((noise + self.width**2) / (self.nu**2 + self.width**2)).log()
        angles = time * torch.arange(1, PERIODS + 1, dtype=x.dtype)
        waves = [scaled * (math.pi * 2.0**k) for k in range(self.waves)]
        features = [scaled, *(w.sin() for w in waves), *(w.cos() for w in waves)]
        features += [time, level.unsqueeze(1), angles.sin(), angles.cos()]
        return self.layers(torch.cat(features, 1)) / (noise + self.width**2).sqrt()


class Trained:
    """A network that regresses on rows; `field` is the average of its weights, which roll-outs follow.

    Args:
        network: begins as it is.
        learning_rate: rate of Adam.
        decay: decay of the average, per step, in [0, 1).
    """

    def __init__(self, network: ControlNetwork, learning_rate: float, decay: float) -> None:
        self.network, self.average, self.decay = network, copy.deepcopy(network), decay
        self.average.requires_grad_(False)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        self.online = CallableField(lambda x, level, cond: self.network(x, level))
        self.field = CallableField(lambda x, level, cond: self.average(x, level))

    def step(self, rows: MatchingBatch) -> float:
        """Take one gradient step on rows; return their loss.

        Raises:
            NonFiniteError: if the loss isn't finite.
        """
        loss = matching_loss(self.online, rows)
        if not loss.isfinite():
            raise NonFiniteError("the matching loss isn't finite: lower --learning_rate or --clip")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT)
        self.optimizer.step()
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - self.decay)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, their average and the optimizer's state."""
        parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


class Owner(Protocol):
    """The sampler that a network is made for."""

    energy: Energy
    settings: Any
    seed: int


def make_trained(owner: Owner, name: str, *, nu: float, rate: float = 1.0) -> Trained:
    """Make a network of a sampler, its weights by the seed and its name.

    Args:
        owner: sampler.
        name: name of the network.
        nu: strength of its reference.
        rate: factor of the learning rate.
    """
    s = owner.settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(owner.seed, name).initial_seed())
        network = ControlNetwork(owner.energy.dimension, s.hidden, nu=nu, spread=s.spread, width=s.width)
    return Trained(network, rate * s.learning_rate, s.ema_decay)


def rows_of(number: int) -> Conditioning:
    """Return the conditioning of fields that see none, for so many rows."""
    return Conditioning(("",) * number)
