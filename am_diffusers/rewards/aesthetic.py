"""LAION aesthetic predictor v2: how much people would like a picture, from 1 to 10; prompts don't matter.

Schuhmann 2022, improved-aesthetic-predictor (github.com/christophschuhmann): a head of five linear layers on
the CLIP ViT-L/14 image embedding of length 1, `w . f/|f| + b` (see `heads`). Scored as there, with the
preprocessing of the CLIP package. It is easily fooled: beyond about 8 a picture is made for the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPModel

from am_diffusers.rewards.hf_clip import check_is_clip, load_clip
from am_diffusers.rewards.learned import DIFFERENTIABLE, FeatureReward, RewardOptions
from am_diffusers.rewards.parts.files import find_file, read_weights, save_weights, state_dict_of
from am_diffusers.rewards.parts.heads import AffineHead, collapse
from am_diffusers.rewards.parts.hf_files import download_remedy
from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat, clip_package_crop

RELEASED_VISION = "openai/clip-vit-large-patch14"
# Of sac+logos+ava1-l14-linearMSE.pth as others report it; no real file was ever seen here.
RELEASED_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HEAD_FILE = "aesthetic_head.safetensors"
DOWNLOAD = (
    "get sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/improved-aesthetic-predictor, or"
    " run `hf download birder-project/aesthetic-predictor openai-clip_aesthetic-predictor.pt`"
)


class Aesthetic(FeatureReward):
    """Aesthetic score of pictures; about 5.4 for the released head. Build it with `from_pretrained`.

    Args:
        clip: the CLIP model; its text tower isn't used and not kept.
        head: the head on image features of length 1.
        options: how it runs.
    """

    name = "aesthetic"
    # By its reported sha256 the file of Schuhmann's repository, under another name.
    released = "birder-project/aesthetic-predictor/openai-clip_aesthetic-predictor.pt"

    def __init__(self, clip: CLIPModel, *, head: AffineHead, options: RewardOptions = DIFFERENTIABLE) -> None:
        super().__init__(nn.ModuleList([clip.vision_model, clip.visual_projection]), options=options)
        config: Any = clip.config.vision_config
        self._vision_model, self._projection = clip.vision_model, clip.visual_projection
        self._format = PixelFormat(config.image_size, CLIP_MEAN, CLIP_STD)
        self._head = head

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
        vision: str | Path | None = None,
    ) -> "Aesthetic":
        """Load a head and the CLIP model below it.

        Args:
            path: the head: the released pickle, a safetensors file, their place on the hub, or a folder with
                aesthetic_head.safetensors.
            revision: commit of the head on the hub.
            sha256: of the head's file; None = that of the released pickle, and none for safetensors.
            options: how it runs.
            vision: folder or hub id of the CLIP model; by default `path` itself when it is a folder that
                holds one, else openai/clip-vit-large-patch14.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit.
        """
        weights, source = _read_head(path, revision, sha256)
        own = (Path(path) / "config.json").is_file()
        place = str(vision or (path if own else RELEASED_VISION))
        remedy = download_remedy(RELEASED_VISION)
        check_is_clip(place, None, cls.__name__, remedy)
        clip = load_clip(place, None, cls.__name__, remedy)
        head = collapse(weights, source, clip.visual_projection.out_features)
        return cls(clip, head=head, options=options)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._format.normalise(clip_package_crop(images, self._format.size, self.options.mode))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self._projection(self._vision_model(pixels).pooler_output)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._head(self._features(pixels))


def convert_released(path: str | Path, folder: Path, sha256: str | None) -> None:
    """Write the released head as a folder that `Aesthetic.from_pretrained` reads, for instance beside CLIP.

    Args:
        path: the file or its place on the hub.
        folder: where aesthetic_head.safetensors is written; it may hold the CLIP model.
        sha256: of the file; None = that of the released pickle.

    Raises:
        ValueError: if the file is missing or isn't such a head.
    """
    weights, source = _read_head(path, None, sha256)
    first = weights.get("layers.0.weight")
    collapse(weights, source, first.shape[-1] if first is not None else 0)
    save_weights(weights, folder / HEAD_FILE)


def _read_head(path: str | Path, revision: str | None, sha256: str | None) -> tuple[dict[str, Tensor], str]:
    """The layers of the head, and where they are."""
    place = Path(path) / HEAD_FILE if Path(path).is_dir() else path
    file = find_file(place, revision, DOWNLOAD)
    pinned = None if file.suffix == ".safetensors" else RELEASED_SHA256
    return state_dict_of(read_weights(file, sha256 or pinned, DOWNLOAD), file, DOWNLOAD), str(file)
