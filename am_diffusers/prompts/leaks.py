"""Leak check: which evaluation prompts a model has been trained on, to the letter or reworded."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """An evaluation prompt that occurs in the training list.

    Attributes:
        index: index of the evaluation prompt.
        prompt: the evaluation prompt.
        training_prompt: prompt of the training list, unchanged.
        kind: `exact` (equal up to unicode form, case and white space) or `reworded`.
    """

    index: int
    prompt: str
    training_prompt: str
    kind: Literal["exact", "reworded"]


@dataclass(frozen=True)
class LeakCheck:
    """Result of a leak check.

    Attributes:
        num_prompts: length of the evaluation list.
        num_training_prompts: length of the training list.
        leaks: one for each pair of an evaluation prompt and a distinct training prompt, exact ones first.
    """

    num_prompts: int
    num_training_prompts: int
    leaks: tuple[Leak, ...]

    def indices(self, kind: Literal["exact", "reworded"] | None = None) -> list[int]:
        """Return the evaluation prompts with a leak of that kind, or of any; ascending."""
        return sorted({leak.index for leak in self.leaks if kind in (None, leak.kind)})

    def lines(self) -> list[str]:
        """Return the lines of the log: counts, then the first examples."""
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
        The pairs found. Time and memory are linear in both lists: 1 s for 60,000 training prompts.
    """
    distinct = {text: normalised(text) for text in dict.fromkeys(training)}
    asked = {prompt: normalised(prompt) for prompt in prompts}
    vocabulary = Vocabulary([*asked.values(), *distinct.values()])
    wanted = {word for text in asked.values() for word in vocabulary.wording(text).words}
    exact, wordings = defaultdict(list), defaultdict(list)
    for text, plain in distinct.items():
        exact[plain].append(text)
        if vocabulary.may_be_of(plain, wanted):
            wording = vocabulary.wording(plain)
            wordings[wording.words].append((wording, text))
    leaks: list[Leak] = []
    for index, prompt in enumerate(prompts):
        wording = vocabulary.wording(asked[prompt])
        same = exact.get(asked[prompt], [])
        alike = wordings.get(wording.words, []) if wording.words else []
        leaks += [Leak(index, prompt, text, "exact") for text in same]
        leaks += [
            Leak(index, prompt, text, "reworded")
            for other, text in alike
            if text not in same and wording.rewords(other)
        ]
    return LeakCheck(len(prompts), len(training), tuple(sorted(leaks, key=lambda leak: leak.kind)))


WORD = re.compile(r"[^\W_]+")


POSSESSIVE = re.compile(r"['\u2019]s\b")


OPENING = re.compile(r"^(an? |the )?(photo|photograph|picture|image) (of|showing) ")


# Dropped: they change with the wording alone. Words of place and negation (under, left, no) are kept.
FILLERS = frozenset(
    WORD.findall(
        "a an the this that these those which who there it its is are was were be been being has have having "
        "and or of on in at to with from by for as into onto some very"
    )
)


# Words that `OPENING` and `POSSESSIVE` remove in some places only.
NO_CONTENT = FILLERS | {"photo", "photograph", "picture", "image", "showing", "s"}


NUMBERS = {
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "leaves": "leaf",
    "wolves": "wolf",
    "knives": "knife",
    "loaves": "loaf",
    "shelves": "shelf",
    "scarves": "scarf",
}


# Singular words that would be taken for the plural of another.
NO_PLURALS = frozenset({"news", "glasses", "lens", "mars", "pants", "jeans"})


PLURALS = (("ies", "y"), ("s", ""), ("es", ""))


def normalised(text: str) -> str:
    """Return the text without differences of unicode form (NFKC), case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Wording:
    """The content words of a prompt, phrase by phrase; a phrase ends at a filler word or punctuation."""

    def __init__(self, phrases: Sequence[Sequence[str]]) -> None:
        """Take the words of each phrase."""
        self._phrases = phrases
        self.words = tuple(sorted(word for phrase in phrases for word in phrase))

    def rewords(self, other: "Wording") -> bool:
        """Tell if both say the same: the same words equally often, none tied to another partner.

        Same words are not enough: `a red cube and a blue ball` is not `a blue cube and a red ball`, and
        `a dog riding a horse` is not `a horse riding a dog`. So no word may share a phrase with x but not y
        in one prompt, and with y but not x in the other.
        """
        if self.words != other.words:
            return False
        here, there = self._pairs(), other._pairs()
        lost, gained = (_words_of(pairs) for pairs in (here - there, there - here))
        return not lost & gained

    def _pairs(self) -> set[tuple[str, ...]]:
        return {pair for phrase in self._phrases for pair in combinations(sorted(phrase), 2)}


class Vocabulary:
    """Maker of singulars from plurals: only of words whose singular occurs too, so that `bus` stays a bus."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Collect the words of all normalised texts that are to be compared."""
        self._words = {word for text in texts for word in WORD.findall(text)}
        self._singulars: dict[str, str] = {}

    def may_be_of(self, text: str, words: Set[str]) -> bool:
        """Tell if a normalised text has no content word but `words`, openings aside: a quick look."""
        return all(word in NO_CONTENT or self._singular(word) in words for word in WORD.findall(text))

    def wording(self, text: str) -> Wording:
        """Return the content words of a normalised text; none in one of fillers, signs or emoji."""
        simple = OPENING.sub("", POSSESSIVE.sub("", text))
        phrases: list[list[str]] = [[]]
        end = 0
        for match in WORD.finditer(simple):
            word = match.group()
            if word in FILLERS or simple[end : match.start()].strip(" -"):
                phrases.append([])
            if word not in FILLERS:
                phrases[-1].append(self._singular(word))
            end = match.end()
        return Wording(phrases)

    def _singular(self, word: str) -> str:
        if word not in self._singulars:
            self._singulars[word] = self._find_singular(word)
        return self._singulars[word]

    def _find_singular(self, word: str) -> str:
        if word in NUMBERS:
            return NUMBERS[word]
        if word in IRREGULAR:
            return IRREGULAR[word]
        if word in NO_PLURALS or word.endswith("ss"):
            return word
        for ending, singular in PLURALS:
            stem = word.removesuffix(ending)
            if stem != word and len(stem + singular) > 2 and stem + singular in self._words:
                return stem + singular
        return word


def _words_of(pairs: Iterable[tuple[str, ...]]) -> set[str]:
    return {word for pair in pairs for word in pair}
