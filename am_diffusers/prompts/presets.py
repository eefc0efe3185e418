"""Published prompt sets by name, each pinned to one revision, and the lists of the embedded model.

Their columns are among the usual ones that `sets.load_prompts` finds. A set is downloaded file by file: of
Pick-a-Pic that is 145 kB instead of 190 GB, as its prompts also exist without the images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from am_diffusers.prompts.files import SUFFIXES, download_command
from am_diffusers.system.files import ASSETS, asset_path
from am_diffusers.system.text import nearest, suggest


@dataclass(frozen=True)
class Preset:
    """Place where a prompt set is published.

    Attributes:
        origin: where it was introduced.
        files: paths in the repository; where there are several, the name of each is the category `style`.
        repository: `owner/name` of a hub data set, or of a GitHub repository; None = the package's assets.
        revision: commit of the repository, 40 hexadecimal digits.
        on_github: whether the repository is on GitHub: then the user downloads the file.
    """

    origin: str
    files: tuple[str, ...]
    repository: str | None = None
    revision: str | None = None
    on_github: bool = False


PRESETS: Mapping[str, Preset] = {
    "DrawBench": Preset(
        "Saharia et al. 2022, arXiv:2205.11487",
        ("DrawBench Prompts - Sheet1.csv",),
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
    ),
    "PartiPrompts": Preset(
        "Yu et al. 2022, arXiv:2206.10789",
        ("PartiPrompts.tsv",),
        "nateraw/parti-prompts",
        "944b156abfdad7627c3221b5ec4f6a6fb060a197",
    ),
    "HPDv2": Preset(
        "Wu et al. 2023, arXiv:2306.09341",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        "zhwang/HPDv2",
        "260dbde75ab1c68e86d32a8e7739f1b49b100578",
    ),
    "Pick-a-Pic": Preset(
        "Kirstain et al. 2023, arXiv:2305.01569; the split validation_unique",
        ("data/validation_unique-00000-of-00001-847ed34b90bbafc3.parquet",),
        "yuvalkirstain/pickapic_v1_no_images",
        "a3592a4f2e6adb7646ef56f3bb18e2968348a163",
    ),
    "GenEval": Preset(
        "Ghosh et al. 2023, arXiv:2310.11513",
        ("prompts/evaluation_metadata.jsonl",),
        "djghosh13/geneval",
        "d927da8e42fde2b1b5cd743da4df5ff83c1654ff",
        on_github=True,
    ),
    "ImageReward": Preset(
        "Xu et al. 2023, arXiv:2304.05977; the benchmark's 100 prompts",
        ("benchmark/benchmark-prompts.json",),
        "THUDM/ImageReward",
        "1beb4e4de0932acbe7fc090c51208048b6269b58",
        on_github=True,
    ),
    "tiny": Preset("held-out prompts of the embedded model", ("eval.txt",)),
    "tiny-train": Preset("training prompts of the embedded model", ("train.txt",)),
}


def is_preset(source: str) -> bool:
    """Tell if a source is the name of a preset, or of a copy of one, and no file or folder."""
    return source.partition("=")[0] in PRESETS and not Path(source).exists()


def preset_files(source: str) -> list[Path] | None:
    """Return the files of a preset, shipped, in the hub's cache or downloaded into it, or the user's copy.

    Args:
        source: a name of `PRESETS`; `NAME=FILE` for a copy of its file (of HPDv2: the folder of its files).

    Returns:
        One file or one a category; None where `source` is no preset: a file or folder goes before the preset
        of that name.

    Raises:
        ValueError: unknown name, with the nearest; a preset's file isn't here and can't be downloaded, with
            the command that does it.
    """
    if not is_preset(source):
        _check_known(source)
        return None
    name, _, copy = source.partition("=")
    return _own_copy(name, Path(copy)) if copy else _published(name)


def describe_source(source: str) -> str:
    """Return where the prompts of `source` are from, for the log and the settings of a run."""
    preset = PRESETS.get(source)
    if Path(asset_path(source)).exists() or "=" in source or (preset and preset.repository is None):
        return source
    if preset is None:
        return f"{source} on the hub, not pinned to a revision"
    return f"{source} ({preset.origin}): {preset.repository} at {preset.revision}"


def _check_known(source: str) -> None:
    """Raise an error that names the nearest preset, or file of the folder, where there is nothing."""
    path = Path(source)
    if path.exists() or ("/" in source and path.suffix not in SUFFIXES):
        return
    if path.suffix in SUFFIXES and "=" not in source:
        known = [file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES]
        near = nearest(path.name, known, cutoff=0.6)
        hint = f": did you mean {str(path.parent / near)!r}?" if near else ""
        raise ValueError(f"prompts {source}: no such file{hint}")
    name = source.partition("=")[0]
    raise ValueError(
        f"prompts {suggest(name, PRESETS)}; or give a file, a data set folder or a hub data set owner/name"
    )


def _own_copy(name: str, copy: Path) -> list[Path]:
    """Find the user's copy of a preset's files."""
    names = [PurePosixPath(file).name for file in PRESETS[name].files]
    files = [copy / file for file in names] if len(names) > 1 and copy.is_dir() else [copy]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise ValueError(f"prompts {name}: there is no {missing[0]}; it is published as {', '.join(names)}")
    return files


def _published(name: str) -> list[Path]:
    """Find a preset's files: shipped, in the hub's cache, or downloaded into it."""
    preset = PRESETS[name]
    if preset.repository is None:
        return [ASSETS / "prompts" / file for file in preset.files]
    if preset.on_github:
        file = preset.files[0]
        raise ValueError(
            f"prompts {name}: they are on GitHub: run `curl -L -O https://raw.githubusercontent.com/"
            f"{preset.repository}/{preset.revision}/{file}` and give `{name}={PurePosixPath(file).name}`"
        )
    try:
        return [
            Path(hf_hub_download(preset.repository, file, repo_type="dataset", revision=preset.revision))
            for file in preset.files
        ]
    except (OSError, EntryNotFoundError) as error:
        command = download_command(preset.repository, files=preset.files, revision=preset.revision)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"prompts {name}: not in the cache, and cannot be downloaded ({reason}): with a network "
            f"run `{command}`, or give a copy: `{name}=PATH`"
        ) from error
