"""Config from YAML files and flags (the command line wins), and back to YAML.

All sections of `config.Config` share one flat name space, so that flags read as in the Diffusers scripts.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from am_diffusers.config import Config, RewardConfig, section_types
from am_diffusers.config.checks import check_belonging, check_values
from am_diffusers.methods import METHODS
from am_diffusers.system.files import read_utf8
from am_diffusers.system.paths import expand
from am_diffusers.system.text import nearest, redact_values

REWARD_LISTS = ("rewards", "eval_rewards")
PATHS = (
    "output_dir",
    "logging_dir",
    "pretrained_model_name_or_path",
    "init_lora",
    "train_prompts",
    "eval_prompts",
    "frontier",
    "resume_from_checkpoint",
)
"""Flags that are paths or may be: their homes are expanded; of rewards, `model` is."""

# Flags of the Diffusers training scripts and of accelerate, and what does the same here.
TRAINING_IMAGES = "no training images are used: rewards score what the model generates for train_prompts"
TOKEN = "log in once with `hf auth login` or set HF_TOKEN: command lines end up in logs"
BEFORE_THE_SCRIPT = (
    "it belongs to accelerate, before the script: accelerate launch --{name} ... scripts/finetune.py"
)
HINTS = {
    "instance_data_dir": TRAINING_IMAGES,
    "instance_prompt": TRAINING_IMAGES,
    "class_data_dir": TRAINING_IMAGES,
    "class_prompt": TRAINING_IMAGES,
    "with_prior_preservation": TRAINING_IMAGES,
    "prior_loss_weight": TRAINING_IMAGES,
    "num_class_images": TRAINING_IMAGES,
    "train_data_dir": TRAINING_IMAGES,
    "image_column": TRAINING_IMAGES,
    "center_crop": TRAINING_IMAGES,
    "random_flip": TRAINING_IMAGES,
    "dataloader_num_workers": TRAINING_IMAGES,
    "token": TOKEN,
    "hub_token": TOKEN,
    "use_auth_token": TOKEN,
    "num_processes": BEFORE_THE_SCRIPT,
    "num_machines": BEFORE_THE_SCRIPT,
    "machine_rank": BEFORE_THE_SCRIPT,
    "main_process_ip": BEFORE_THE_SCRIPT,
    "main_process_port": BEFORE_THE_SCRIPT,
    "multi_gpu": BEFORE_THE_SCRIPT,
    "gpu_ids": BEFORE_THE_SCRIPT,
    "config_file": BEFORE_THE_SCRIPT,
    "gradient_accumulation_steps": "train_batch_size is the total of an iteration, accumulated for you: "
    "for less memory lower loss_micro_batch_size",
    "num_train_epochs": "set max_train_steps; --dry_run says how many epochs that is",
    "dataset_name": "train_prompts takes a hub data set, train_prompts_column names its column",
    "caption_column": "train_prompts_column names the column of the prompts",
    "validation_prompt": """validation_prompts takes a list: --validation_prompts '["a fox", "an owl"]'""",
    "validation_epochs": "validation_steps counts iterations",
    "sample_batch_size": "eval_batch_size sets how many images are sampled at a time",
    "scale_lr": "learning_rate is used as it is, train_batch_size being the total",
    "use_8bit_adam": "--optimizer adamw8bit",
    "train_text_encoder": "the text encoders stay frozen: the LoRA is on the transformer",
    "text_encoder_lr": "the text encoders stay frozen; learning_rate is for the transformer",
    "lora_blocks": "lora_layers names layers, in all blocks at once",
    "guidance_scale": "rollout_guidance_scale is for training, eval_guidance_scale for validation",
    "weighting_scheme": "the method weighs its own loss; transitions and loss_steps choose its steps",
    "cache_dir": "set HF_HOME to move the cache of models and data sets",
    "local_rank": "accelerate sets it: accelerate launch scripts/finetune.py",
    "enable_xformers_memory_efficient_attention": "attention is PyTorch's own, fast and small without a flag",
}


def parse_config(argv: Sequence[str], *, program: str = "finetune.py") -> Config:
    """Read `--config FILE.yaml --flag value ...`; with `--print_config` print the config and exit.

    Args:
        argv: command line without the program's name.
        program: name shown by `--help`.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type or value; the
            message fits one screen.
        SystemExit: after `--print_config` or `--help`.
    """
    parser = _parser(program)
    try:
        words = _replace_rewards(_spell_out_switches(_expand_config_files(argv)))
        parsed = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from error
    sections = _make_sections(_expand_paths(vars(parsed)))
    own = {name: sections.pop(name) for name in METHODS}
    config = Config(own=own, **sections)
    check_values(config)
    check_belonging(config)
    if parsed.print_config:
        sys.stdout.write(to_yaml(config))
        sys.exit()
    return config


def field_types() -> dict[str, Any]:
    """Return the type of every flag by name, in the order of the flags."""
    return {
        name: kind for section in section_types().values() for name, kind in get_type_hints(section).items()
    }


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `--config` reads back to an equal Config (without `dry_run`).

    Secrets in it are redacted (`system/text.py`): it is printed, stored and shared.
    """
    flat = {k: v for section in config.sections().values() for k, v in dataclasses.asdict(section).items()}
    del flat["dry_run"]
    return yaml.safe_dump(redact_values(flat), sort_keys=False, allow_unicode=True, width=110)


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description="Fine-tune a Stable Diffusion 3 model on differentiable rewards by Adjoint Matching.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own would print values that are refused
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; may be repeated.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the config as YAML for --config, and exit."
    )
    known: set[str] = set()
    for section in section_types().values():
        names = {field.name for field in dataclasses.fields(section)}
        if names - known:  # methods may share a class of flags, or have none
            parser.add_class_arguments(section, None, skip=set(known))
        known |= names
    return parser


def _make_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make every section from the values of its flags; raise the errors of all together."""
    sections, errors = {}, list[str]()
    for name, section in section_types().items():
        try:
            sections[name] = section(**{f.name: values[f.name] for f in dataclasses.fields(section)})
        except ValueError as error:
            errors += str(error).splitlines()
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    return sections


def _expand_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all flags with expanded paths; raise the errors of all together."""
    expanded, errors = dict(values), list[str]()

    def of(name: str, path: str | None) -> str | None:
        try:
            return None if path is None else expand(path)
        except ValueError as error:
            errors.append(f"--{name} {error}")
            return path

    for name in PATHS:
        expanded[name] = of(name, values[name])
    for name in REWARD_LISTS:
        if values[name] is not None:
            expanded[name] = [dataclasses.replace(each, model=of(name, each.model)) for each in values[name]]
    if errors:
        raise ValueError("\n".join(errors))
    return expanded


def _expand_config_files(argv: Sequence[str]) -> list[str]:
    """Expand the paths of the config files."""
    words: list[str] = []
    for before, token in zip(["", *argv], argv, strict=False):
        flag = "--config=" if token.startswith("--config=") else ""
        is_path = bool(flag) or before == "--config"
        try:
            words.append(flag + expand(token.removeprefix(flag)) if is_path else token)
        except ValueError as error:
            raise ValueError(f"--config {error}") from error
    return words


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """Spell out bare boolean flags, as in the Diffusers scripts: `--dry_run` means `--dry_run=true`."""
    following = [*argv, "--"][1:]
    switches = {f"--{name}" for name, annotation in field_types().items() if annotation is bool}
    return [
        f"{token}=true" if token in switches and after.startswith("--") else token
        for token, after in zip(argv, following, strict=True)
    ]


def _replace_rewards(argv: Sequence[str]) -> list[str]:
    """Empty a list of rewards before each flag or file that sets it.

    Jsonargparse merges an item into the one it replaces where both lists are as long, so that a reward named
    on the command line would keep the weights of the config file's.
    """
    words: list[str] = []
    for token, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, _, value = token.partition("=")
        for name in _lists_set_by(flag, value or following):
            words += [f"--{name}", "[]"]
        words.append(token)
    return words


def _lists_set_by(flag: str, value: str) -> list[str]:
    """Return the lists of rewards that a flag sets, by itself or by the config file it names."""
    if flag != "--config":
        return [name for name in REWARD_LISTS if flag == f"--{name}"]
    try:
        keys = yaml.safe_load(read_utf8(Path(value)))
    except (OSError, yaml.YAMLError):
        return []  # the parser says what is wrong with it
    except ValueError as error:
        raise ValueError(f"--config {value}: {error}") from error
    return [name for name in REWARD_LISTS if isinstance(keys, dict) and name in keys]


def _explain(message: str) -> str:
    """Return jsonargparse's message, with the nearest known key for an unknown one."""
    unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", message)
    if unknown is None:
        return message
    name = unknown[1] or unknown[2]
    if name in HINTS:
        return f"there is no '{name}' here: {HINTS[name].format(name=name)}"
    known = [*field_types(), "config", *(f.name for f in dataclasses.fields(RewardConfig))]
    return f"unknown key '{name}': did you mean '{nearest(name, known)}'? (all keys: --help)"
