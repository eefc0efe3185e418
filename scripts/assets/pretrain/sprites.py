"""Stage `sprites`: the world's objects, RGBA PNGs of `SIZE` pixels, from Microsoft's Fluent Emoji in 3D.

Sources are fetched with `npm pack`; nothing else is downloaded.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from .concepts import CONCEPTS

SIZE = 128
PACKAGES = {"fluent": "@lobehub/fluent-emoji-3d@1.1.0", "labels": "emojibase-data@17.0.0"}


def fetch(name: str, downloads: Path) -> Path:
    """Download and unpack one of `PACKAGES`; its folder."""
    target = downloads / name
    if not (target / "package").exists():
        target.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", PACKAGES[name], "--json"]
        listing = subprocess.run(command, cwd=target, check=True, capture_output=True, text=True)
        with tarfile.open(target / json.loads(listing.stdout)[0]["filename"]) as archive:
            archive.extractall(target, filter="data")
    return target / "package"


def fit(image: Image.Image) -> Image.Image:
    """Crop to the visible part, pad to a square and resize to `SIZE`."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def build_sprites(parquet: Path, downloads: Path) -> None:
    """Write name and PNG of each concept to `parquet`."""
    fluent = fetch("fluent", downloads) / "assets"
    entries = json.loads((fetch("labels", downloads) / "en" / "data.json").read_text())
    codes = {entry["label"]: entry["hexcode"].lower() for entry in entries}
    rows = []
    for concept in CONCEPTS:
        code = codes[concept.label].removesuffix("-fe0f")
        file = next(f for f in (fluent / f"{code}.webp", fluent / f"{code}-fe0f.webp") if f.exists())
        buffer = io.BytesIO()
        fit(Image.open(file).convert("RGBA")).save(buffer, "PNG")
        rows.append({"concept": concept.name, "png": buffer.getvalue()})
    parquet.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), parquet)


def read_sprites(parquet: Path) -> Tensor:
    """Read the sprites (concepts, 4, SIZE, SIZE) in [0, 1], colours multiplied by opacity.

    Raises:
        ValueError: they are of other concepts.
    """
    table = {row["concept"]: row["png"] for row in pq.read_table(parquet).to_pylist()}
    names = [concept.name for concept in CONCEPTS]
    if list(table) != names:
        raise ValueError(f"{parquet}: expected {names}, found {list(table)}; make it anew by stage `sprites`")
    bank = np.stack([np.asarray(Image.open(io.BytesIO(table[name]))) for name in names])
    rgba = torch.from_numpy(bank).permute(0, 3, 1, 2).float() / 255
    rgba[:, :3] *= rgba[:, 3:]  # so that resampling has no dark fringes
    return rgba
