"""Build the captioned picture set of the tiny pipeline from permissively licensed emoji art.

One row per (concept, style): a 64 x 64 RGBA PNG. Three styles, one source each (see the NOTICE beside the
parquet): Fluent Emoji 3D, Noto Emoji, Twemoji. Backgrounds, captions and placement are added when training.
Sources are fetched with `npm pack`; nothing else is downloaded.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 64
PACKAGES = {
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@twemoji/svg@15.0.0",
    "labels": "emojibase-data@17.0.0",
}
CONCEPTS = """red apple|green apple|banana|lemon|grapes|watermelon|pineapple|strawberry|cherries|pear|tomato|
carrot|eggplant|avocado|broccoli|ear of corn|cucumber|hot pepper|mushroom|bread|croissant|pretzel|
cheese wedge|hamburger|pizza|hot dog|taco|egg|french fries|doughnut|cookie|birthday cake|cupcake|
lollipop|ice cream|popcorn|teapot|hot beverage|wine glass|beer mug|fox|wolf|lion|panda|koala|pig|
frog|rabbit|bear|monkey face|elephant|giraffe|zebra|hedgehog|bat|penguin|owl|duck|flamingo|rooster|
eagle|turtle|snake|crocodile|whale|dolphin|tropical fish|shark|octopus|crab|snail|butterfly|
honeybee|lady beetle|spider|rose|sunflower|tulip|cactus|palm tree|evergreen tree|maple leaf|rocket|
airplane|helicopter|bus|ambulance|police car|taxi|tractor|locomotive|bicycle|sailboat|house|castle|
soccer ball|basketball|guitar|alarm clock|umbrella|fire|snowman|star|crown|key|balloon|light bulb|
hammer"""
SHORT = {
    "ear of corn": "corn",
    "cheese wedge": "cheese",
    "french fries": "fries",
    "hot beverage": "coffee",
    "monkey face": "monkey",
    "lady beetle": "ladybug",
    "honeybee": "bee",
    "evergreen tree": "pine tree",
    "locomotive": "steam train",
    "alarm clock": "clock",
}


def fetch(folder: Path) -> dict[str, Path]:
    """Download and unpack the four npm packages into `folder`; returns the folder of each."""
    unpacked = {}
    for name, package in PACKAGES.items():
        target = folder / name
        if not target.exists():
            target.mkdir(parents=True)
            listing = subprocess.run(
                ["npm", "pack", package, "--json"], cwd=target, check=True, capture_output=True, text=True
            )
            with tarfile.open(target / json.loads(listing.stdout)[0]["filename"]) as archive:
                archive.extractall(target, filter="data")
        unpacked[name] = target / "package"
    return unpacked


def render_svg(svg: str) -> Image.Image:
    """Rasterise an SVG at twice the final size and reduce it, RGBA."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def fit(picture: Image.Image) -> Image.Image:
    """Crop to the visible part, pad to a square and resize to `SIZE`."""
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def pictures_of(hexcode: str, slug: str, sources: dict[str, Path], noto: dict) -> dict[str, Image.Image]:
    """The concept in each style, keyed by style name."""
    code = hexcode.lower()
    plain = code.removesuffix("-fe0f")
    fluent = sources["fluent"] / "assets" / f"{plain}.webp"
    if not fluent.exists():
        fluent = fluent.with_name(f"{plain}-fe0f.webp")
    icons = noto["icons"]
    slug = noto.get("aliases", {}).get(slug, {}).get("parent", slug)
    body = icons[slug]["body"]
    width, height = icons[slug].get("width", noto["width"]), icons[slug].get("height", noto["height"])
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    return {
        "3d": Image.open(fluent).convert("RGBA"),
        "cartoon": render_svg(svg),
        "flat": render_svg((sources["twemoji"] / f"{plain}.svg").read_text()),
    }


def build(parquet: Path, downloads: Path) -> int:
    """Write the picture set to `parquet`; returns the number of pictures."""
    sources = fetch(downloads)
    labels = json.loads((sources["labels"] / "en" / "data.json").read_text())
    hexcodes = {entry["label"]: entry["hexcode"] for entry in labels}
    noto = json.loads((sources["noto"] / "icons.json").read_text())
    characters = json.loads((sources["noto"] / "chars.json").read_text())
    rows = []
    for label in CONCEPTS.replace("\n", "").split("|"):
        code = hexcodes[label].lower()
        slug = characters.get(code) or characters[code.removesuffix("-fe0f")]
        for style, picture in pictures_of(code, slug, sources, noto).items():
            buffer = io.BytesIO()
            fit(picture).save(buffer, "PNG")
            rows.append({"concept": SHORT.get(label, label), "style": style, "png": buffer.getvalue()})
    parquet.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return len(rows)
