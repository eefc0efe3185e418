"""Leak check: which evaluation prompts a model has been trained on, to the letter or reworded."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from am_diffusers.wording import Vocabulary, normalised

SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """An evaluation prompt that stands in the training list.

    Attributes:
        index: of the evaluation prompt.
        prompt: the evaluation prompt.
        training_prompt: as it stands in the training list.
        kind: `exact` (equal up to unicode form, case and white space) or `reworded`.
    """

    index: int
    prompt: str
    training_prompt: str
    kind: Literal["exact", "reworded"]


@dataclass(frozen=True)
class LeakCheck:
    """What a leak check found.

    Attributes:
        num_prompts: length of the evaluation list.
        num_training_prompts: length of the training list.
        leaks: one for each pair of an evaluation prompt and a distinct training prompt, exact ones first.
    """

    num_prompts: int
    num_training_prompts: int
    leaks: tuple[Leak, ...]

    def indices(self, kind: Literal["exact", "reworded"] | None = None) -> list[int]:
        """Evaluation prompts with a leak of that kind, or of any; ascending."""
        return sorted({leak.index for leak in self.leaks if kind in (None, leak.kind)})

    def lines(self) -> list[str]:
        """What the log says: counts, then the first examples."""
        lists = f"{self.num_prompts} evaluation prompts, {self.num_training_prompts} training prompts"
        if not self.leaks:
            return [f"leak check: {lists}: none in both, exact or reworded"]
        exact = self.indices("exact")
        reworded = [index for index in self.indices("reworded") if index not in exact]
        head = (
            f"leak check: {lists}: {len(exact) + len(reworded)} evaluation prompts were trained on "
            f"({len(exact)} exact, {len(reworded)} reworded): scores on them say little about new prompts"
        )
        shown = [
            f"  {leak.kind}: prompt {leak.index} {leak.prompt!r}: trained on {leak.training_prompt!r}"
            for leak in self.leaks[:SHOWN]
        ]
        more = len(self.leaks) - SHOWN
        return [head, *shown, *([f"  and {more} more"] if more > 0 else [])]


def find_leaks(prompts: Sequence[str], training: Sequence[str]) -> LeakCheck:
    """Compare every evaluation prompt with every training prompt.

    A pair is `exact` if the texts are equal after unicode normalisation (NFKC), case folding and merging of
    white space. It is `reworded` if both hold the same content words equally often and tie them to the same
    partners (`Wording.rewords`). What doesn't count: the order of words and phrases, punctuation, articles
    and other fillers (`wording.FILLERS`), an opening `a photo of`, singular or plural, `two` or `2` (up to
    ten). One other content word (colour, number, object, style, place) makes another prompt: lists made from
    templates hold combinations out on purpose. Not found: synonyms, misspellings, translations, and additions
    such as `highly detailed`.

    Args:
        prompts: evaluation prompts.
        training: training prompts, with or without repetitions.

    Returns:
        The pairs found. Time and memory are linear in both lists.
    """
    distinct = list(dict.fromkeys(training))
    vocabulary = Vocabulary([*prompts, *distinct])
    exact, wordings = defaultdict(list), defaultdict(list)
    for text in distinct:
        exact[normalised(text)].append(text)
        wording = vocabulary.wording(text)
        wordings[wording.words].append((wording, text))
    leaks: list[Leak] = []
    for index, prompt in enumerate(prompts):
        wording = vocabulary.wording(prompt)
        same = exact.get(normalised(prompt), [])
        alike = wordings.get(wording.words, []) if wording.words else []
        leaks += [Leak(index, prompt, text, "exact") for text in same]
        leaks += [
            Leak(index, prompt, text, "reworded")
            for other, text in alike
            if text not in same and wording.rewords(other)
        ]
    return LeakCheck(len(prompts), len(training), tuple(sorted(leaks, key=lambda leak: leak.kind)))
