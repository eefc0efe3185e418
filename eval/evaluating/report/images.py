"""Images of the report: which prompts it shows, and the images as text in the page itself."""

import base64
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from am_diffusers.evaluation.statistics import Array
from evaluating.summary.results import Results

# Up to this side the PNG itself is embedded: pixels that can be counted shouldn't be smeared.
EXACT_SIDE = 128
QUALITY = 85
# Characters of all embedded images together; a browser opens such a page within seconds.
MAX_CHARACTERS = 100_000_000

Embedded = dict[str, list[str]]


def gain_order(base: Array, tuned: Array) -> list[tuple[int, int]]:
    """Return all (prompt, image) by the gain of the tuned over the base image, largest first.

    Args:
        base: scores (P, S).
        tuned: scores (P, S) of the images from the same noise.
    """
    order = np.argsort((base - tuned).ravel(), kind="stable")
    return [divmod(int(place), base.shape[1]) for place in order]


def prompts_to_show(results: Results, number: int) -> list[int]:
    """Return the prompts whose images are embedded, most wanted first.

    Two thirds have the largest gains and losses of every candidate by every reward, the rest is
    spread evenly over the others.

    Args:
        results: results of the evaluation.
        number: largest number of prompts.
    """
    extreme = dict.fromkeys(islice(dict.fromkeys(_extremes(results)), -(-2 * number // 3)))
    others = [prompt for prompt in range(len(results.prompts)) if prompt not in extreme]
    count = min(number - len(extreme), len(others))
    places = np.linspace(0, len(others) - 1, count).round().astype(int) if count else ()
    return [*extreme, *(others[place] for place in places)]


def _extremes(results: Results) -> Iterator[int]:
    """Yield prompts of the largest gain and loss by every reward, then of the second largest, and so on."""
    orders = [
        gain_order(results.scores[candidate.base.key][reward], results.scores[candidate.key][reward])
        for candidate in results.tuned
        for reward in results.scores[candidate.key]
    ]
    for rank in range(len(orders[0]) if orders else 0):
        for order in orders:
            yield order[rank][0]
            yield order[-1 - rank][0]


def embed_images(results: Results, number: int, side: int) -> dict[int, Embedded]:
    """Embed images of the most wanted prompts as `data:` addresses, by prompt and candidate key.

    Args:
        results: results of the evaluation.
        number: largest number of prompts; fewer where their images would exceed `MAX_CHARACTERS`.
        side: side in pixels of images larger than `EXACT_SIDE`.

    Raises:
        ValueError: if an image is missing or can't be read.
    """
    images = range(next(iter(next(iter(results.scores.values())).values())).shape[1])
    embedded: dict[int, Embedded] = {}
    total = 0
    for prompt in prompts_to_show(results, number):
        pictures = {
            candidate.key: [data_address(results.image(candidate, prompt, i), side) for i in images]
            for candidate in results.candidates
        }
        total += sum(len(address) for addresses in pictures.values() for address in addresses)
        if embedded and total > MAX_CHARACTERS:
            break
        embedded[prompt] = pictures
    return embedded


def data_address(file: Path, side: int) -> str:
    """Return an image as a `data:` address: small ones as they are, others as WebP of `side` pixels.

    Args:
        file: PNG.
        side: longest side of the embedded image, in pixels.

    Raises:
        ValueError: if the file is missing or no image.
    """
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if max(image.size) <= EXACT_SIDE:
                image.verify()
                return f"data:image/png;base64,{base64.b64encode(content).decode()}"
            small = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{file}: expected a readable PNG of the evaluation, got {error}; run the evaluation again: it "
            "makes missing and damaged images anew"
        ) from error
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
