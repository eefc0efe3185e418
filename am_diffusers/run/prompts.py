"""The prompt lists of a run: loaded as its flags say, evaluation prompts compared with training prompts."""

from collections.abc import Sequence

from am_diffusers.config import Config
from am_diffusers.prompts.leaks import find_leaks
from am_diffusers.prompts.rows import check_unicode
from am_diffusers.prompts.sets import load_texts
from am_diffusers.system.text import redact


def load_lists(config: Config) -> tuple[list[str], list[str]]:
    """Load training and evaluation prompts; the latter are empty without `--eval_prompts`.

    Raises:
        ValueError: a list can't be read, or an evaluation has one prompt.
    """
    train, evaluation = config.prompts, config.evaluation
    check_unicode("--negative_prompt", [config.model.negative_prompt])
    training = load_texts(
        train.train_prompts,
        column=train.train_prompts_column,
        split=train.train_prompts_split,
        limit=train.max_train_prompts,
    )
    if evaluation.eval_prompts is None:
        return training, []
    held_out = load_texts(
        evaluation.eval_prompts,
        column=evaluation.eval_prompts_column,
        split=evaluation.eval_prompts_split,
        limit=evaluation.max_eval_prompts,
    )
    if len(held_out) < 2:
        raise ValueError(f"{evaluation.eval_prompts}: intervals over prompts need at least 2 prompts, got 1")
    return training, held_out


def check_leaks(evaluation: Sequence[str], training: Sequence[str]) -> str:
    """Return a text about evaluation prompts that are trained on, with examples; empty if there are none."""
    found = find_leaks(evaluation, training)
    if not found.leaks:
        return ""
    remedy = "  to evaluate on new prompts remove them from one of the two lists"
    return redact("\n".join([*found.lines(), remedy]))
