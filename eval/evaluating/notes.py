"""What a reader of the results must know of prompts and LoRAs: repetitions, cut-off prompts, leaks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from am_diffusers.leaks import find_leaks
from am_diffusers.models.text import token_counters
from am_diffusers.prompt_presets import find_prompts
from am_diffusers.prompt_report import report_prompts
from am_diffusers.prompts import load_prompts
from am_diffusers.system.files import asset_path
from evaluating.options import Options
from evaluating.plan import Plan
from evaluating.runs import run_configs


def make_notes(plan: Plan) -> tuple[str, ...]:
    """Lines about the prompts, then about each LoRA.

    Raises:
        ValueError: `--train_prompts` can't be read.
    """
    counters = token_counters(plan.source, plan.max_sequence_length)
    lines = report_prompts(plan.prompts, counters).lines()
    configs = run_configs(plan.candidates)
    lines += _other_bases(configs, plan.options.pretrained_model_name_or_path)
    for training in _training_lists(plan.options, configs):
        lines += _leaks(plan, training)
    return tuple(lines)


def _other_bases(configs: Mapping[str, dict[str, Any]], base: str) -> list[str]:
    """LoRAs that were trained on another base, as far as names tell."""
    lines = []
    for name, config in configs.items():
        own = str(config.get("pretrained_model_name_or_path", base))
        if Path(asset_path(own)).name != Path(asset_path(base)).name:
            lines.append(f"{name} was trained on {own} and is evaluated on {base}: is that the same model?")
    return lines


class TrainingList(NamedTuple):
    """Where the prompts of a run are."""

    source: str
    column: str = "prompt"
    split: str = "train"
    limit: int | None = None


def _training_lists(options: Options, configs: Mapping[str, dict[str, Any]]) -> list[TrainingList]:
    """What the LoRAs were trained on, each list once."""
    if options.train_prompts is not None:
        return [TrainingList(options.train_prompts)]
    found = [
        TrainingList(
            str(config["train_prompts"]),
            config.get("train_prompts_column", "prompt"),
            config.get("train_prompts_split", "train"),
            config.get("max_train_prompts"),
        )
        for config in configs.values()
    ]
    return list(dict.fromkeys(found))


def _leaks(plan: Plan, training: TrainingList) -> list[str]:
    """The leak check against a list; one that a run names and that isn't here any more is no error."""
    source, column, split, limit = training
    try:
        if plan.options.train_prompts is not None:
            prompts = find_prompts(asset_path(source)).prompts
        else:
            prompts = load_prompts(asset_path(source), column=column, split=split, limit=limit)
    except ValueError as error:
        if plan.options.train_prompts is not None:
            raise
        return [f"no leak check: {error}"]
    return [f"{source}: {line}" for line in find_leaks(plan.prompts.prompts, prompts).lines()]
