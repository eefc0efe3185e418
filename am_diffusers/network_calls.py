"""How often a method calls the transformer: what a plan announces."""

from collections.abc import Callable

from am_diffusers.config import Config

FIRST = "base, forward if step 0 is trained"


def network_calls(config: Config) -> dict[str, float]:
    """Transformer calls of one sample in an iteration, by kind, before masking; means over iterations.

    A guided velocity counts its calls: two, and three where its vector-Jacobian product is taken.
    """
    return CALLS[config.method.method](config)


def _adjoint_matching(config: Config) -> dict[str, float]:
    method = config.method
    steps, guided = method.num_inference_steps, method.rollout_guidance_scale != 1
    everywhere = guided and method.guidance_mode == "everywhere"
    trained = steps - 1 if method.loss_steps == "all" else method.loss_steps
    call, vjp = (2, 3) if everywhere else (1, 1)
    return {
        "policy, rollout": (steps - 1) * (2 if guided else 1),
        "policy, residuals for the mask": trained if guided and not everywhere else 0,
        "base, forward and backward": (steps - 1) * vjp,
        "policy, forward and backward for the full adjoint": (steps - 2) * vjp * (method.adjoint == "full"),
        FIRST: call,
        "policy, forward and backward of the loss": trained * call,
    }


def _buffered_adjoint_matching(config: Config) -> dict[str, float]:
    every = config.buffer.buffer_refresh
    return {
        kind: calls if kind.endswith("of the loss") else calls / every
        for kind, calls in _adjoint_matching(config).items()
    }


CALLS: dict[str, Callable[[Config], dict[str, float]]] = {
    "adjoint_matching": _adjoint_matching,
    "buffered_adjoint_matching": _buffered_adjoint_matching,
}
