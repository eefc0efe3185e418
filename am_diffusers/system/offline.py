"""Keep the Hugging Face libraries off the network for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets.config
import huggingface_hub.constants


@contextmanager
def offline() -> Iterator[None]:
    """Let models and data sets be read from folders and caches alone, as HF_HUB_OFFLINE=1 does."""
    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
