"""When two prompts are the same: to the letter, or reworded. English only; nothing is downloaded.

Words are compared, not characters: in lists made from templates, `fox, 3d style, on a blue background` and
`fox, 3d style, on a red background` share most characters, yet are two prompts that a split keeps apart.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import combinations

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
    """The text without differences of unicode form (NFKC), case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Wording:
    """The content words of a prompt, phrase by phrase; a phrase ends at a filler word or punctuation."""

    def __init__(self, phrases: Sequence[Sequence[str]]) -> None:
        """Take the words of each phrase."""
        self._phrases = phrases
        self.words = tuple(sorted(word for phrase in phrases for word in phrase))

    def rewords(self, other: "Wording") -> bool:
        """Whether both say the same: the same words equally often, none tied to another partner.

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
    """Makes singulars of plurals: only of words whose singular occurs too, so that `bus` stays a bus."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Collect the words of all texts that are to be compared."""
        self._words = {word for text in texts for word in WORD.findall(normalised(text))}

    def wording(self, text: str) -> Wording:
        """The content words of a text; none in a text of fillers, signs or emoji."""
        simple = OPENING.sub("", POSSESSIVE.sub("", normalised(text)))
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
