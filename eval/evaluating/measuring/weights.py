"""Fingerprints of a model's weights, so that values of other weights aren't taken for its own."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from am_diffusers.rewards.parts.packaged import PREFIX
from am_diffusers.system.files import asset_path, is_hidden, sha256, sha256_of_text

COMMIT = re.compile(r"[0-9a-f]{40}")
TEXTS = (".md", ".html")
NOT_HERE = "not downloaded yet"


def fingerprint(model: str | None, revision: str | None = None) -> str:
    """Return the SHA-256 of local files, the commit of a hub id, or a package's version; "" without a model.

    Args:
        model: folder, file, `asset:` path, hub id (with a file behind it, or not) or `package:NAME`.
        revision: revision of a hub id.
    """
    if model is None:
        return ""
    if model.startswith(PREFIX):
        return f"version {version(model.removeprefix(PREFIX))}"
    path = Path(asset_path(model))
    if path.is_file():
        return _of_files(path.parent, [path])
    if path.is_dir():
        shown = (file for file in path.rglob("*") if not is_hidden(file, path))
        return _of_files(path, sorted(file for file in shown if file.suffix not in TEXTS))
    return _commit("/".join(model.split("/")[:2]), revision or "main")


def _of_files(root: Path, files: Sequence[Path]) -> str:
    states = [(file, file.stat()) for file in files if file.is_file()]
    known = tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in states)
    return f"sha256 {_digest(root, known)}"


@cache
def _digest(root: Path, states: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash names and contents; read files again only if a size or date changed."""
    lines = [f"{file.relative_to(root)} {sha256(file)}" for file, *_ in states]
    return sha256_of_text("\n".join(lines))[:16]


def _commit(repository: str, revision: str) -> str:
    """Return the commit of a revision in the hub's cache."""
    if COMMIT.fullmatch(revision):
        return f"commit {revision}"
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    reference = Path(HF_HUB_CACHE) / folder / "refs" / revision
    return f"commit {reference.read_text().strip()}" if reference.is_file() else NOT_HERE
