"""Objects and backgrounds of the world: their names, and which background would hide which object."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """An object of the world.

    Attributes:
        name: as captions have it.
        label: of its emoji in Unicode.
        avoids: backgrounds it is never on, since it would hardly be seen.
    """

    name: str
    label: str
    avoids: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """Name it with its article, for example `an owl`."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


BACKGROUNDS = {
    "white": (244, 244, 244),
    "black": (30, 30, 34),
    "gray": (142, 142, 146),
    "red": (205, 45, 48),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 160, 85),
    "blue": (55, 105, 215),
    "purple": (135, 72, 190),
    "pink": (248, 165, 205),
}

CONCEPTS = (
    Concept("apple", "red apple", ("red",)),
    Concept("banana", "banana", ("yellow", "orange")),
    Concept("strawberry", "strawberry", ("red", "pink")),
    Concept("carrot", "carrot", ("orange",)),
    Concept("mushroom", "mushroom", ("red",)),
    Concept("hamburger", "hamburger", ("orange",)),
    Concept("doughnut", "doughnut", ("orange",)),
    Concept("cupcake", "cupcake", ("pink",)),
    Concept("fox", "fox", ("orange",)),
    Concept("panda", "panda"),
    Concept("pig", "pig face", ("pink",)),
    Concept("frog", "frog", ("green",)),
    Concept("penguin", "penguin", ("purple",)),
    Concept("owl", "owl", ("orange",)),
    Concept("octopus", "octopus", ("orange",)),
    Concept("crab", "crab", ("red", "pink")),
    Concept("sunflower", "sunflower", ("yellow", "orange")),
    Concept("cactus", "cactus", ("green",)),
    Concept("pine tree", "evergreen tree", ("green",)),
    Concept("rocket", "rocket", ("white",)),
    Concept("car", "automobile", ("red",)),
    Concept("house", "house", ("red", "orange")),
    Concept("star", "star", ("yellow", "orange")),
    Concept("heart", "red heart", ("red", "pink")),
    Concept("key", "key", ("yellow", "orange")),
    Concept("umbrella", "umbrella", ("purple",)),
    Concept("crown", "crown", ("yellow", "orange")),
    Concept("snowman", "snowman without snow", ("white",)),
    Concept("soccer ball", "soccer ball"),
    Concept("moon", "crescent moon", ("yellow", "orange")),
    Concept("dog", "dog face", ("orange",)),
    Concept("pumpkin", "jack-o-lantern", ("orange",)),
)
