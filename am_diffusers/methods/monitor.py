"""Watches the norms of adjoints and says so, once, before they overflow.

A lean adjoint under the base contracts towards noise, roughly like the derivative of the clean estimate: its
norm at step 1 is at most a few times that at the end. Two things are told apart: norms that grow *along* the
trajectory, against the terminal one, from the first iteration on (a Jacobian that expands); and norms that
grow from iteration to iteration, against a running reference of the same step (a policy that runs away).

Who has which: Adjoint Matching, buffered or deterministic, has adjoints along trajectories, so both. (Under
the base's ODE the adjoint of data N(m, S^2 I) grows to at most sqrt(1 + S^2) times the terminal one.)
Efficient Adjoint Matching has the adjoint at its end points alone, so growth over iterations only. RAM and
Flow-GRPO take no gradient of the reward, DRaFT and ReFL no adjoint: none.
"""

import math
from collections.abc import Mapping
from typing import Any

LIMITS = {"steps": 4.0, "iterations": 10.0}
"""How many times a reference a norm may be. On configs/tiny_sd3.yaml mean norms stay below 1.9 times that of
the last step; with guidance 7 in the adjoint they are 5 to 10 times it from the first iteration on."""
DECAY = 0.98
"""Of the reference, a geometric mean over about 50 iterations: growth by 5 % an iteration is noticed."""
CAUSES = {
    "steps": "guidance in the adjoint, the full adjoint, or too few steps for the base",
    "iterations": "a reward_scale or learning rate with which the policy leaves what the base knows, or the "
    "full adjoint, which differentiates that policy",
}


class AdjointMonitor:
    """Warns once of growth over steps, and once of growth over iterations."""

    def __init__(self) -> None:
        self._logs: dict[int, float] = {}
        self._warned: list[str] = []

    def update(self, norms: Mapping[int, float]) -> list[str]:
        """Take the norms of an iteration by step, the terminal one last; what there is to say of them.

        Args:
            norms: of adjoint_k by k = 1 .. K, a typical value over the samples of all ranks.
        """
        terminal = max(norms)
        found = {
            "steps": self._largest(norms, dict.fromkeys(norms, norms[terminal])),
            "iterations": self._largest(norms, {k: math.exp(log) for k, log in self._logs.items()}),
        }
        for k, norm in norms.items():
            if norm > 0:
                log = math.log(norm)
                self._logs[k] = DECAY * self._logs.get(k, log) + (1 - DECAY) * log
        texts = {
            "steps": f"that of the last step, {norms[terminal]:.3g}",
            "iterations": "its running mean over earlier iterations",
        }
        new = [
            name for name, (ratio, _) in found.items() if ratio > LIMITS[name] and name not in self._warned
        ]
        self._warned = self._warned + new
        return [
            f"the adjoint norm of step {k} is {norms[k]:.3g}, {ratio:.3g} times {texts[name]}; likely "
            f"causes: {CAUSES[name]} (said once)"
            for name in new
            for ratio, k in [found[name]]
        ]

    def state_dict(self) -> dict[str, Any]:
        """References and what was said, JSON-serialisable."""
        return {"logs": {str(k): log for k, log in self._logs.items()}, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._logs = {int(k): log for k, log in state.get("logs", {}).items()}
        self._warned = list(state.get("warned", []))

    @staticmethod
    def _largest(norms: Mapping[int, float], references: Mapping[int, float]) -> tuple[float, int]:
        """The largest ratio of a norm to its reference, and its step; 0 without references."""
        ratios = [(norms[k] / references[k], k) for k in norms if references.get(k, 0) > 0]
        return max(ratios, default=(0.0, 0))
