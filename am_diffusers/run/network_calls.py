"""What an iteration of each method costs: transformer calls, which a plan announces, and rows of a sample."""

from collections.abc import Callable

from am_diffusers.config import Config
from am_diffusers.methods.refl import last_quarter

Calls = dict[str, float]

LOSS = "policy, forward and backward of the loss"
FIRST = "base, forward if step 0 is trained"


def network_calls(config: Config) -> Calls:
    """Transformer calls of one sample in an iteration, by kind, before masking; means over iterations.

    With `step_selection: pps` the call at step 0 is counted as in its first iteration.

    A guided velocity counts its calls: two, and three where its vector-Jacobian product is taken.
    """
    return CALLS[config.method.method](config)


def trained_rows(config: Config) -> int:
    """Rows that one sample is trained on in an iteration, before masking."""
    return ROWS[config.method.method](config)


def _guidance(config: Config) -> int:
    return 2 if config.method.rollout_guidance_scale != 1 else 1


def _adjoint_matching(config: Config) -> Calls:
    method, trained, guidance = config.method, trained_rows(config), _guidance(config)
    steps, everywhere = method.num_inference_steps, guidance > 1 and method.guidance_mode == "everywhere"
    call, vjp = (2, 3) if everywhere else (1, 1)
    return {
        "policy, rollout": (steps - 1) * guidance,
        "policy, residuals for the mask": trained if guidance > 1 and not everywhere else 0,
        "base, forward and backward": (steps - 1) * vjp,
        "policy, forward and backward for the full adjoint": (steps - 2) * vjp * (method.adjoint == "full"),
        FIRST: call * _chance_of_first(config),
        LOSS: trained * call,
    }


def _chance_of_first(config: Config) -> float:
    """Share of the iterations with a rollout that train step 0, see methods/step_selection.py.

    For pps that of its start, when all steps count as of one size; later it follows their residuals.
    """
    number, total = trained_rows(config), config.method.num_inference_steps - 1
    if config.method.step_selection == "last_and_random":
        last = number // 2
        return (number - last) / (total - last)
    return 1 / (total // number) if config.method.step_selection == "stratified" else number / total


def _buffered_adjoint_matching(config: Config) -> Calls:
    every = config.buffer.buffer_refresh
    return {
        kind: calls if kind == LOSS else calls / every for kind, calls in _adjoint_matching(config).items()
    }


def _efficient(config: Config) -> Calls:
    renoised = config.efficient.eam_score == "renoised"
    return {
        "policy, rollout": config.efficient.eam_ode_steps * _guidance(config),
        "base, forward": int(renoised),
        "base, forward and backward": int(not renoised),
        LOSS: trained_rows(config),
    }


def _deterministic(config: Config) -> Calls:
    rows, guidance = trained_rows(config), _guidance(config)
    return {
        "policy, rollout": config.method.num_inference_steps * guidance,
        "policy, residuals for the mask": rows if guidance > 1 else 0,
        "base, forward and backward": rows - 1,
        "base, forward": 1,
        LOSS: rows,
    }


def _selected_steps(config: Config) -> int:
    steps = config.method.loss_steps
    return config.method.num_inference_steps - 1 if steps == "all" else steps


def _draft(config: Config) -> Calls:
    tail, guidance = config.baselines.draft_steps, _guidance(config)
    return {
        "policy, rollout": (config.method.num_inference_steps - tail) * guidance,
        LOSS: tail * guidance,
    }


def _flow_grpo(config: Config) -> Calls:
    trained, guidance, passes = trained_rows(config), _guidance(config), config.baselines.grpo_passes
    return {
        "policy, rollout": (config.method.num_inference_steps - 1) * guidance / passes,
        "base, at trained steps and the last": (trained + 1) * guidance / passes,
        LOSS: trained * guidance,
    }


def _ram(config: Config) -> Calls:
    noises = trained_rows(config)
    return {
        "policy, rollout": config.method.num_inference_steps * _guidance(config),
        "policy, at the noise levels": noises,
        "base, at the noise levels": noises,
        LOSS: noises,
    }


def _refl(config: Config) -> Calls:
    steps, guidance = config.method.num_inference_steps, _guidance(config)
    last = config.baselines.refl_last_steps or last_quarter(steps)
    return {"policy, rollout": (steps - (last + 1) / 2) * guidance, LOSS: guidance}


CALLS: dict[str, Callable[[Config], Calls]] = {
    "adjoint_matching": _adjoint_matching,
    "buffered_adjoint_matching": _buffered_adjoint_matching,
    "deterministic_adjoint_matching": _deterministic,
    "draft": _draft,
    "efficient_adjoint_matching": _efficient,
    "flow_grpo": _flow_grpo,
    "ram": _ram,
    "refl": _refl,
}
ROWS: dict[str, Callable[[Config], int]] = {
    "adjoint_matching": _selected_steps,
    "buffered_adjoint_matching": _selected_steps,
    "deterministic_adjoint_matching": lambda config: (
        config.deterministic.truncate_steps or config.method.num_inference_steps
    ),
    "draft": lambda _: 1,
    "efficient_adjoint_matching": lambda config: config.efficient.eam_rows,
    "flow_grpo": _selected_steps,
    "ram": lambda config: config.baselines.ram_noises,
    "refl": lambda _: 1,
}
