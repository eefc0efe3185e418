"""What an iteration of each method costs: transformer calls and training rows of a sample."""

from collections.abc import Callable

from am_diffusers.config import Config

Calls = dict[str, float]

LOSS = "policy, forward and backward of the loss"
FIRST_STEP = "base, forward if step 0 is trained"


def network_calls(config: Config) -> Calls:
    """Transformer calls of one sample in an iteration, by kind, before masking.

    Guidance counts two calls for each.
    """
    calls = CALLS[config.method.method](config)
    return calls | {LOSS: trained_rows(config)}


def trained_rows(config: Config) -> int:
    """Rows that one sample is trained on in an iteration, before masking."""
    return ROWS[config.method.method](config)


def _guidance(config: Config) -> int:
    return 2 if config.method.rollout_guidance_scale != 1 else 1


def _adjoint_matching(config: Config) -> Calls:
    method, guidance = config.method, _guidance(config)
    steps = method.num_inference_steps
    return {
        "policy, rollout": (steps - 1) * guidance,
        "policy, residuals for the mask": trained_rows(config) if guidance > 1 else 0,
        "base, forward and backward": steps - 1,
        "policy, forward and backward for the full adjoint": steps - 2 if method.adjoint == "full" else 0,
        FIRST_STEP: 1,
    }


def _adjoint_matching_rows(config: Config) -> int:
    steps = config.method.loss_steps
    return config.method.num_inference_steps - 1 if steps == "all" else steps


def _efficient(config: Config) -> Calls:
    renoised = config.efficient.eam_score == "renoised"
    return {
        "policy, rollout": config.efficient.eam_ode_steps * _guidance(config),
        "base, forward": int(renoised),
        "base, forward and backward": int(not renoised),
    }


def _deterministic(config: Config) -> Calls:
    rows, guidance = trained_rows(config), _guidance(config)
    return {
        "policy, rollout": config.method.num_inference_steps * guidance,
        "policy, residuals for the mask": rows if guidance > 1 else 0,
        "base, forward and backward": rows - 1,
        "base, forward": 1,
    }


CALLS: dict[str, Callable[[Config], Calls]] = {
    "adjoint_matching": _adjoint_matching,
    "efficient_adjoint_matching": _efficient,
    "deterministic_adjoint_matching": _deterministic,
}
ROWS: dict[str, Callable[[Config], int]] = {
    "adjoint_matching": _adjoint_matching_rows,
    "efficient_adjoint_matching": lambda config: config.efficient.eam_rows,
    "deterministic_adjoint_matching": lambda config: (
        config.deterministic.truncate_steps or config.method.num_inference_steps
    ),
}
