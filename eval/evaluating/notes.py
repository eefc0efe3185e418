"""Notes for readers of the results on prompts and LoRAs: repetitions, cut-off prompts, leaks."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from am_diffusers.models.pretrained import Pretrained
from am_diffusers.prompts.leaks import find_leaks, normalised
from am_diffusers.prompts.sets import PromptSet, load_prompts, load_texts
from am_diffusers.system.files import asset_path
from evaluating.options import Options
from evaluating.plan import Plan
from evaluating.runs import run_configs, targets
from evaluating.store import is_stochastic_table
from evaluating.summary.tilt import ENOUGH_IMAGES


def make_notes(plan: Plan) -> tuple[str, ...]:
    """Return lines about the prompts, then about each LoRA.

    Raises:
        ValueError: `--train_prompts` can't be read.
    """
    counters = token_counters(plan.source, plan.max_sequence_length)
    lines = report_prompts(plan.prompts, counters).lines()
    configs = run_configs(plan.candidates)
    lines += _other_bases(configs, plan.options.pretrained_model_name_or_path)
    lines += _fused(configs)
    lines += _tilts(plan, configs)
    for training in _training_lists(plan.options, configs):
        lines += _leaks(plan, training)
    return tuple(lines)


def token_counters(
    source: Pretrained, max_sequence_length: int
) -> dict[str, tuple[Callable[[str], int], int]]:
    """Return by tokenizer a function that counts a text's tokens, and how many of them the model reads.

    Special tokens are counted. Tokenizers that the pipeline lacks are left out; no weights are read.
    """
    index = source.config("model_index.json")
    counters: dict[str, tuple[Callable[[str], int], int]] = {}
    for name, (folder, limit) in source.family.tokenizers(max_sequence_length).items():
        if index.get(folder, [None])[0] is None:
            continue
        tokenizer = AutoTokenizer.from_pretrained(source.path, subfolder=folder, revision=source.revision)

        def count(text: str, tokenizer: Any = tokenizer) -> int:
            return len(tokenizer(text, verbose=False).input_ids)

        counters[name] = (count, tokenizer.model_max_length if limit is None else limit)
    return counters


def _other_bases(configs: Mapping[str, dict[str, Any]], base: str) -> list[str]:
    """Name LoRAs that were trained on another base, as far as names tell."""
    lines = []
    for name, config in configs.items():
        own = str(config.get("pretrained_model_name_or_path", base))
        if Path(asset_path(own)).name != Path(asset_path(base)).name:
            lines.append(f"{name} was trained on {own} and is evaluated on {base}: is that the same model?")
    return lines


def _fused(configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Name LoRAs that contain the one their run had in its base."""
    return [
        f"{name} contains the LoRA {config.get('init_lora')} that was in the base of its run: it is compared "
        "with the model without both, not with the tilt that the run aimed at"
        for name, config in configs.items()
        if config.get("init_lora_as_base")
    ]


def _tilts(plan: Plan, configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Say where a run's tilt is told for another chain than that of training, or by few images."""
    sampler, known = plan.options.sampler, targets(plan.candidates)
    if not known or not is_stochastic_table(sampler):
        return []
    lines: list[str] = []
    for candidate in plan.candidates:
        if candidate.name not in known:
            continue
        config = configs[candidate.name]
        own = [config.get(name) for name in ("num_inference_steps", "transitions", "rollout_guidance_scale")]
        here = [candidate.num_inference_steps, sampler, candidate.guidance_scale]
        negative = [config.get("negative_prompt", ""), plan.options.negative_prompt]
        if candidate.guidance_scale == 1:  # then there is none
            negative[0] = negative[1]
        if [*own, negative[0]] != [*here, negative[1]]:
            words = "{} steps of {}, guidance {}" + " from {!r}" * (negative[0] != negative[1])
            trained, evaluated = (words.format(*c, n) for c, n in zip((own, here), negative, strict=True))
            lines.append(
                f"{candidate.name} was trained with {trained}, and is compared with the tilt of {evaluated}: "
                "what is predicted holds for the latter"
            )
    if plan.options.num_images_per_prompt < ENOUGH_IMAGES:
        lines.append(
            f"--num_images_per_prompt {plan.options.num_images_per_prompt} is little to tell what the tilt "
            "of the base would give: 64 does for moderate reward scales"
        )
    return list(dict.fromkeys(lines))


class TrainingList(NamedTuple):
    """Source of the prompts of a run."""

    source: str
    column: str = "prompt"
    split: str = "train"
    limit: int | None = None


def _training_lists(options: Options, configs: Mapping[str, dict[str, Any]]) -> list[TrainingList]:
    """Return the training lists of the LoRAs, each once."""
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
        if "train_prompts" in config
    ]
    return list(dict.fromkeys(found))


def _leaks(plan: Plan, training: TrainingList) -> list[str]:
    """Check for leaks against a list; a list that a run names and that no longer exists is no error."""
    source, column, split, limit = training
    try:
        if plan.options.train_prompts is not None:
            prompts = load_prompts(source, texts_only=True).prompts
        else:
            prompts = load_texts(source, column=column, split=split, limit=limit)
    except ValueError as error:
        if plan.options.train_prompts is not None:
            raise
        return [f"no leak check: {error}"]
    return [f"{source}: {line}" for line in find_leaks(plan.prompts.prompts, prompts).lines()]


SHOWN = 3


WIDTH = 80


@dataclass(frozen=True)
class Overlong:
    """Prompts of which a text encoder reads the beginning only.

    Attributes:
        tokenizer: name of the tokenizer.
        limit: tokens it keeps.
        prompts: index and number of tokens of each longer prompt.
    """

    tokenizer: str
    limit: int
    prompts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PromptReport:
    """Findings on a prompt set; none of them stops an evaluation.

    Attributes:
        prompts: the set.
        duplicates: groups of at least two indices whose texts are equal up to unicode form, case and white
            space. They are evaluated as they are: the text counts as often as it occurs.
        overlong: one for each tokenizer, in the order given.
    """

    prompts: PromptSet
    duplicates: tuple[tuple[int, ...], ...]
    overlong: tuple[Overlong, ...]

    @property
    def num_repeated(self) -> int:
        """Number of prompts that repeat an earlier one."""
        return sum(len(group) - 1 for group in self.duplicates)

    def lines(self) -> list[str]:
        """Return the lines of the log: the size of the set, then each finding with its first examples."""
        categories = [
            f"{len(set(values) - {''})} of {name}" for name, values in self.prompts.categories.items()
        ]
        lines = [", ".join([f"prompts: {len(self.prompts)}", *categories])]
        if self.duplicates:
            groups = [f"{self._quote(group[0])} at {', '.join(map(str, group))}" for group in self.duplicates]
            lines.append(
                f"{self.num_repeated} prompts repeat an earlier one and count again: {_first(groups)}"
            )
        return lines + [self._cut_off(found) for found in self.overlong if found.prompts]

    def _cut_off(self, found: Overlong) -> str:
        texts = [f"prompt {i} ({tokens} tokens) {self._quote(i)}" for i, tokens in found.prompts]
        limit = f"the {found.limit} tokens of {found.tokenizer}"
        return f"{len(texts)} prompts are cut off at {limit}: {_first(texts)}"

    def _quote(self, index: int) -> str:
        text = self.prompts.prompts[index]
        return repr(text if len(text) <= WIDTH else text[: WIDTH - 3] + "...")


def report_prompts(
    prompts: PromptSet, tokenizers: Mapping[str, tuple[Callable[[str], int], int]]
) -> PromptReport:
    """Look for repeated and for over-long prompts.

    Args:
        prompts: the set.
        tokenizers: by name, a function that counts the tokens of a text without cutting it off, special
            tokens included, and the number of tokens that are kept.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(prompts.prompts):
        groups[normalised(text)].append(index)
    return PromptReport(
        prompts=prompts,
        duplicates=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        overlong=tuple(
            Overlong(name, limit, _longer(prompts, count, limit))
            for name, (count, limit) in tokenizers.items()
        ),
    )


def _longer(prompts: PromptSet, count: Callable[[str], int], limit: int) -> tuple[tuple[int, int], ...]:
    lengths = [(index, count(text)) for index, text in enumerate(prompts.prompts)]
    return tuple((index, tokens) for index, tokens in lengths if tokens > limit)


def _first(examples: Sequence[str]) -> str:
    return "; ".join([*examples[:SHOWN], *(["..."] if len(examples) > SHOWN else [])])
