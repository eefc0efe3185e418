"""Config from YAML files and flags (the command line wins), and back to YAML.

All sections of `config.Config` share one flat name space, so that flags read as in the Diffusers scripts.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from am_diffusers.config import Config, RewardConfig

SECTIONS = typing.get_type_hints(Config)
FIELDS = {
    name: annotation
    for section in SECTIONS.values()
    for name, annotation in typing.get_type_hints(section).items()
}


def parse_config(argv: Sequence[str], *, program: str = "finetune.py") -> Config:
    """Config of `--config FILE.yaml --flag value ...`.

    Args:
        argv: command line without the program's name.
        program: name shown by `--help`.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type or value; the
            message fits one screen.
    """
    parser = _parser(program)
    try:
        parsed = parser.instantiate(parser.parse_args(_spell_out_switches(argv)))
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from error
    sections = {
        name: section(**{f.name: parsed[f.name] for f in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
    }
    config = Config(**sections)
    check_values(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to an equal Config (`dry_run` left out)."""
    flat = {key: value for section in dataclasses.asdict(config).values() for key, value in section.items()}
    del flat["dry_run"]
    return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True, width=110)


def asset_path(path: str) -> str:
    """`path` with a leading `asset:` replaced by the package's asset folder.

    Raises:
        ValueError: if the package ships no such asset.
    """
    if not path.startswith("asset:"):
        return path
    folder = Path(__file__).parent / "assets"
    resolved = folder / path.removeprefix("asset:")
    if not resolved.exists():
        shipped = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.exists() else "none"
        raise ValueError(f"{path}: no such asset in {folder} (shipped: {shipped})")
    return str(resolved)


def check_values(config: Config) -> None:
    """Ranges that need no file and no model.

    Raises:
        ValueError: naming every flag out of range, what it must be and what it is.
    """
    model, method, optimizer, evaluation = config.model, config.method, config.optimizer, config.evaluation
    checks = [
        (config.method.rewards, "rewards", "a list with at least one reward"),
        (model.resolution > 0, "resolution", "a positive number of pixels"),
        (model.max_sequence_length > 0, "max_sequence_length", "a positive number of tokens"),
        (model.rank > 0, "rank", "positive"),
        (model.lora_alpha > 0, "lora_alpha", "positive"),
        (method.num_inference_steps >= 2, "num_inference_steps", "at least 2: the last one is deterministic"),
        (method.reward_scale > 0, "reward_scale", "positive: rewards are higher-is-better"),
        (
            method.loss_steps == "all" or 1 <= method.loss_steps < method.num_inference_steps,
            "loss_steps",
            "'all' or from 1 to num_inference_steps - 1: the last step has no noise and no loss",
        ),
        (
            method.mask_quantile is None or 0 < method.mask_quantile < 1,
            "mask_quantile",
            "in (0, 1), or null to keep every row",
        ),
        (0 <= method.sigma_jitter < 0.5, "sigma_jitter", "in [0, 0.5)"),
        (optimizer.train_batch_size >= 1, "train_batch_size", "at least 1"),
        (optimizer.max_train_steps >= 1, "max_train_steps", "at least 1"),
        (optimizer.learning_rate > 0, "learning_rate", "positive"),
        (
            optimizer.lr_scheduler != "constant" or optimizer.lr_warmup_steps == 0,
            "lr_warmup_steps",
            "0 with lr_scheduler constant (constant_with_warmup has one)",
        ),
        (optimizer.max_grad_norm > 0, "max_grad_norm", "positive"),
        ((optimizer.rollout_micro_batch_size or 1) >= 1, "rollout_micro_batch_size", "at least 1 or null"),
        ((optimizer.reward_micro_batch_size or 1) >= 1, "reward_micro_batch_size", "at least 1 or null"),
        (optimizer.loss_micro_batch_size >= 1, "loss_micro_batch_size", "at least 1"),
        (evaluation.num_validation_images >= 1, "num_validation_images", "at least 1"),
        (evaluation.validation_steps >= 1, "validation_steps", "at least 1"),
        (evaluation.eval_images_per_prompt >= 2, "eval_images_per_prompt", "at least 2, for diversity"),
        (evaluation.eval_inference_steps >= 1, "eval_inference_steps", "at least 1"),
        (evaluation.eval_batch_size >= 1, "eval_batch_size", "at least 1"),
    ]
    values = {f: v for s in dataclasses.asdict(config).values() for f, v in s.items()}
    wrong = [f"--{name} must be {rule}, got {values[name]}" for good, name, rule in checks if not good]
    if wrong:
        raise ValueError("\n".join(wrong))


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description="Fine-tune a Stable Diffusion 3 model on differentiable rewards by Adjoint Matching.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; may be repeated.")
    for section in SECTIONS.values():
        parser.add_class_arguments(section, None)
    return parser


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """`--dry_run` means `--dry_run=true`: a bare boolean flag, as in the Diffusers scripts."""
    following = [*argv, "--"][1:]
    switches = {f"--{name}" for name, annotation in FIELDS.items() if annotation is bool}
    return [
        f"{token}=true" if token in switches and after.startswith("--") else token
        for token, after in zip(argv, following, strict=True)
    ]


def _explain(message: str) -> str:
    """Jsonargparse's message, with the nearest known key where one is unknown."""
    unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", message)
    if unknown is None:
        return message
    name = unknown[1] or unknown[2]
    known = [*FIELDS, "config", *(f.name for f in dataclasses.fields(RewardConfig))]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown key '{name}': did you mean '{nearest}'? (all keys: --help)"
