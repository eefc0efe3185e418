"""Transformer calls of one sample in an iteration, by kind: what a config costs, before masking.

Guidance counts two calls for each where it is on.
"""

from collections.abc import Callable

from am_diffusers.config import Config
from am_diffusers.methods.refl import last_quarter


def network_calls(config: Config) -> dict[str, float]:
    """Calls of a sample an iteration, by kind; a mean where iterations differ."""
    return CALLS[config.method.method](config)


def _guided(config: Config) -> int:
    return 1 if config.method.rollout_guidance_scale == 1 else 2


def _trained_steps(config: Config) -> int:
    method = config.method
    return method.num_inference_steps - 1 if method.loss_steps == "all" else method.loss_steps


def _adjoint_matching(config: Config) -> dict[str, float]:
    method, steps, trained = config.method, config.method.num_inference_steps, _trained_steps(config)
    return {
        "policy, rollout": (steps - 1) * _guided(config),
        "policy, residuals for the mask": trained if _guided(config) > 1 else 0,
        "base, forward and backward": steps - 1,
        "policy, forward and backward for the full adjoint": steps - 2 if method.adjoint == "full" else 0,
        "base, forward if step 0 is trained": 1,
        "policy, forward and backward of the loss": trained,
    }


def _ram(config: Config) -> dict[str, float]:
    noises = config.baselines.ram_noises
    return {
        "policy, rollout": config.method.num_inference_steps * _guided(config),
        "policy, at the noise levels": noises,
        "base, at the noise levels": noises,
        "policy, forward and backward of the loss": noises,
    }


def _draft(config: Config) -> dict[str, float]:
    tail, times = config.baselines.draft_steps, _guided(config)
    return {
        "policy, rollout": (config.method.num_inference_steps - tail) * times,
        "policy, forward and backward of the loss": tail * times,
    }


def _refl(config: Config) -> dict[str, float]:
    steps, times = config.method.num_inference_steps, _guided(config)
    last = config.baselines.refl_last_steps or last_quarter(steps)
    return {
        "policy, rollout (mean)": (steps - (last + 1) / 2) * times,
        "policy, forward and backward of the loss": times,
    }


def _flow_grpo(config: Config) -> dict[str, float]:
    steps, trained, times = config.method.num_inference_steps, _trained_steps(config), _guided(config)
    passes = config.baselines.grpo_passes
    return {
        "policy, rollout (mean)": (steps - 1) * times / passes,
        "base, at trained steps and the last (mean)": (trained + 1) * times / passes,
        "policy, forward and backward of the loss": trained * times,
    }


CALLS: dict[str, Callable[[Config], dict[str, float]]] = {
    "adjoint_matching": _adjoint_matching,
    "draft": _draft,
    "flow_grpo": _flow_grpo,
    "ram": _ram,
    "refl": _refl,
}
