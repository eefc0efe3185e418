"""Prompt sets for evaluation: texts with their categories, where they come from, and what is wrong with them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; the index of a prompt is its id, from which the noise of its pictures follows.

    Attributes:
        prompts: P >= 1 texts, none blank.
        categories: by category column, the P values of it; "" where a prompt has none.
        rows: the P rows as they were read (GenEval's judge wants its metadata back); {} where there are none.

    Raises:
        ValueError: if the lengths disagree.
    """

    prompts: tuple[str, ...]
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[dict[str, object], ...] = ()

    def __post_init__(self) -> None:
        columns = {"rows": self.rows or self.prompts, **self.categories}
        for name, column in columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"PromptSet: {len(self.prompts)} prompts but {len(column)} of {name}")

    def __len__(self) -> int:
        return len(self.prompts)
