"""DreamSim: embeddings trained on people's judgements of which images are alike (arXiv 2306.09344).

Needs the package dreamsim, which downloads its weights and, through `torch.hub`, runs code of
facebookresearch/dino from GitHub: nothing of either is pinned here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from am_diffusers.rewards.parts.packaged import PREFIX, load_module
from am_diffusers.rewards.parts.preprocess import to_pil
from evaluating.measuring.features.base import Features


class DreamSim(Features):
    """Embedding of the ensemble, (B, 1792); 1 - cos is the published distance.

    Build it with `from_pretrained`.

    Args:
        model: has `embed`: prepared images to embeddings.
        prepare: the package's preprocessing: a PIL image to (1, 3, 224, 224) in [0, 1].
        device: where the model runs.
        batch_size: images per pass; None = all at once.
    """

    name = "dreamsim"
    released = PREFIX + "dreamsim"

    def __init__(
        self,
        model: nn.Module,
        *,
        prepare: Callable[[Image.Image], Tensor],
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size)
        self._model: Any = model
        self._prepare = prepare

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "DreamSim":
        """Load the ensemble of the package, see `Features`.

        Args:
            path: folder of its weights, downloaded if they aren't there; by default `dreamsim` in the folder
                of `torch.hub`.
            revision: must be None.
            device: where the model runs.
            batch_size: images per pass; None = all at once.

        Raises:
            ValueError: if the package or the weights are missing (with the command that gets them).
        """
        if revision is not None:
            raise ValueError(
                f"{cls.name}'s weights come from a package: no `revision` of them, got {revision!r}"
            )
        package = load_module("dreamsim", "run `pip install dreamsim`")
        hub = torch.hub.get_dir()
        folder = Path(hub) / "dreamsim" if str(path) == cls.released else Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            model, prepare = package.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
        except OSError as error:  # no network, too
            command = f"from dreamsim import dreamsim; dreamsim(device='cpu', cache_dir='{folder}')"
            raise ValueError(
                f'{cls.name}\'s weights not found in {folder} ({error}): run `python -c "{command}"`'
            ) from error
        finally:
            torch.hub.set_dir(hub)  # which the package moves to its own folder
        return cls(model, prepare=prepare, device=device, batch_size=batch_size)

    def _pixels(self, images: Tensor) -> Tensor:
        return torch.cat([self._prepare(image) for image in to_pil(images)])

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._model.embed(pixels)
