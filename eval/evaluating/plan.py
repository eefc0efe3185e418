"""Plan of an evaluation: the command line, checked before any weights are read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_diffusers.models.base import without_weights
from am_diffusers.models.lora_files import LORA_FILE, PEFT_FILE, find_lora
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.prompts.rows import check_negative_prompt
from am_diffusers.prompts.sets import PromptSet, load_prompts
from am_diffusers.system.files import digest, read_declaration
from am_diffusers.system.resolution import Resolution, read_resolution
from evaluating.candidates import BASE, Candidate
from evaluating.layouts import check_layout
from evaluating.measuring.features import LPIPS
from evaluating.measuring.measures import Measure, choose_features, choose_rewards
from evaluating.measuring.references import find_references
from evaluating.measuring.weights import fingerprint
from evaluating.options import Options
from evaluating.runs import trained_rewards
from evaluating.store import CHUNK

NAME, OTHER = re.compile(r"[\w.-]+"), re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Plan:
    """Plan of an evaluation.

    Attributes:
        options: the command line.
        settings: settings that all images depend on, plain JSON values.
        source: the base model.
        size: width and height of the images.
        max_sequence_length: T5 tokens.
        prompts: prompts to render.
        candidates: the base at each sampler setting, then the LoRAs.
        measures: rewards, then features, then changes.
    """

    options: Options
    settings: dict[str, Any]
    source: Pretrained
    size: Resolution
    max_sequence_length: int
    prompts: PromptSet
    candidates: tuple[Candidate, ...]
    measures: tuple[Measure, ...]


def make_plan(options: Options) -> Plan:
    """Check what was asked for and read the prompts.

    Raises:
        ValueError: what is wrong and what to do about it.
    """
    if options.batch_size > CHUNK:
        raise ValueError(
            f"--batch_size {options.batch_size}: images are shared out by {CHUNK}, use at most that"
        )
    check_negative_prompt(options.negative_prompt, options.guidance_scale)
    source = Pretrained(options.pretrained_model_name_or_path, options.revision, options.variant)
    declared = read_declaration(source.path)
    size = options.resolution or read_resolution(source.family.resolution(source.config_of))
    shape = source.family.latent_shape(source.config_of, size.height, size.width)
    levels = source.levels()
    for steps in options.num_inference_steps:
        levels.solver(options.sampler, steps, shape)
    length = options.max_sequence_length or declared.get("max_sequence_length", 256)
    source.family.check_length(length)
    candidates = make_candidates(options)
    for lora in {each.lora: None for each in candidates if each.lora is not None}:
        without_weights(source).load_lora(lora)
    rewards = choose_rewards(options.rewards, declared.get("rewards", {}))
    features = choose_features(
        options.features, rewards, declared.get("rewards", {}), trained_rewards(candidates)
    )
    if options.reference_pictures is not None:
        find_references(options.reference_pictures, features)
    prompts = load_prompts(
        options.prompts,
        column=options.prompts_column,
        category_columns=options.category_columns,
        split=options.prompts_split,
        limit=options.max_prompts,
    )
    for layout in options.layouts:
        check_layout(layout, prompts, options.num_images_per_prompt)
    settings = {
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "revision": options.revision,
        "variant": options.variant,
        "mixed_precision": options.mixed_precision,
        "sampler": options.sampler,
        "resolution": size.setting,
        "max_sequence_length": length,
        "negative_prompt": options.negative_prompt or None,
        "seed": options.seed,
        "num_images_per_prompt": options.num_images_per_prompt,
        "num_prompts": len(prompts),
        "prompts": digest(list(prompts.prompts)),
        "base_weights": fingerprint(source.path, options.revision),
    }
    changes = [Measure("changes", LPIPS.name, None)] if options.lpips else []
    measures = (*rewards, *features, *changes)
    return Plan(options, settings, source, size, length, prompts, candidates, measures)


def make_candidates(options: Options) -> tuple[Candidate, ...]:
    """Make the base at each number of steps and guidance, then each LoRA at each scale.

    Raises:
        ValueError: no such LoRA, or two of one name.
    """
    files = [lora_file(text) for text in options.lora_path]
    names = _names(files)
    settings = [(steps, scale) for steps in options.num_inference_steps for scale in options.guidance_scale]
    bases = [Candidate(BASE, *setting) for setting in settings]
    tuned = [
        Candidate(name, *setting, lora=file, lora_scale=scale)
        for name, (_, file) in zip(names, files, strict=True)
        for scale in options.lora_scale
        for setting in settings
    ]
    candidates = (*bases, *tuned)
    keys = [candidate.key for candidate in candidates]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the same model is asked for twice: {', '.join(keys)}: name each once")
    return candidates


def lora_file(text: str) -> tuple[str | None, Path]:
    """Split `[NAME=]PATH` into name and the LoRA's file.

    Raises:
        ValueError: if there is no such file; says where one would be.
    """
    name, _, path = text.partition("=") if not Path(text).exists() else ("", "", text)
    if not path:
        name, path = "", text
    if name and not NAME.fullmatch(name):
        raise ValueError(f"--lora_path {text}: a name has letters, digits, '.', '_' and '-' only")
    return name or None, find_lora(path)


def _names(files: Sequence[tuple[str | None, Path]]) -> list[str]:
    """Return given names, else the last folder that tells one LoRA from the others.

    A name becomes a folder and a link: other characters than those of `NAME` are `-` in it.
    """
    names = []
    for name, file in files:
        stem = [] if file.name in (LORA_FILE, PEFT_FILE) else [file.stem]
        parts = [OTHER.sub("-", part).strip("-") for part in (*file.resolve().parts[:-1], *stem)]
        names.append([name] if name else [part for part in parts if part])
    for depth in range(1, 1 + max((len(parts) for parts in names), default=0)):
        short = ["_".join(parts[-depth:]) for parts in names]
        if len(set(short)) == len(short) and BASE not in short:
            return short
    if not files:
        return []
    raise ValueError("two of --lora_path have the same name, or one is called base: name them, NAME=PATH")
