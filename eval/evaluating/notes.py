"""What a reader of the results must know of prompts and LoRAs: repetitions, cut-off prompts, leaks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from am_diffusers.command_line import asset_path
from am_diffusers.leaks import find_leaks
from am_diffusers.models.text import token_counters
from am_diffusers.prompt_report import report_prompts
from am_diffusers.prompts import load_prompts
from evaluating.candidates import Candidate
from evaluating.options import Options
from evaluating.plan import Plan, run_config


def make_notes(plan: Plan) -> tuple[str, ...]:
    """Lines about the prompts, then about each LoRA."""
    counters = token_counters(plan.source, plan.max_sequence_length)
    lines = report_prompts(plan.prompts, counters).lines()
    configs = run_configs(plan.candidates)
    lines += _other_bases(configs, plan.options.pretrained_model_name_or_path)
    for training in _training_lists(plan.options, configs):
        lines += _leaks(plan, training)
    return tuple(lines)


def run_configs(candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """The config of the run that each LoRA came from by its name, where it is known."""
    found = {candidate.name: run_config(candidate.lora) for candidate in candidates if candidate.lora}
    return {name: config for name, config in found.items() if config}


def trained_rewards(candidates: Sequence[Candidate]) -> dict[str, tuple[str, ...]]:
    """Names of the rewards each LoRA was trained on, where its run is known."""
    found = {}
    for name, config in run_configs(candidates).items():
        rewards = config.get("rewards")
        if isinstance(rewards, list):
            found[name] = tuple(str(reward["name"]) for reward in rewards if "name" in reward)
    return found


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
        if config.get("train_prompts")
    ]
    return list(dict.fromkeys(found))


def _leaks(plan: Plan, training: TrainingList) -> list[str]:
    """The leak check against a list; a list that isn't here any more is no reason to lose results."""
    source, column, split, limit = training
    try:
        prompts = load_prompts(asset_path(source), column=column, split=split, limit=limit)
    except ValueError as error:
        return [f"no leak check: {error}"]
    return [f"{source}: {line}" for line in find_leaks(plan.prompts.prompts, prompts).lines()]
