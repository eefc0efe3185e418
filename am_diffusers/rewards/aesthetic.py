"""LAION aesthetic predictor v2: the rating from 1 to 10 people would give an image; prompts don't matter.

Schuhmann 2022, improved-aesthetic-predictor (github.com/christophschuhmann): a head of five linear layers on
the CLIP ViT-L/14 image embedding of length 1, `w . f/|f| + b` (see `heads`). Scored as there, with the
preprocessing of the CLIP package. It is easily fooled: beyond about 8 an image is made for the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPModel

from am_diffusers.rewards.base import DIFFERENTIABLE, Column, RewardOptions
from am_diffusers.rewards.clip import clip_format, without_text
from am_diffusers.rewards.learned import FeatureReward, Skeleton
from am_diffusers.rewards.parts.files import find_file, read_weights, save_weights, state_dict_of
from am_diffusers.rewards.parts.heads import AffineHead, collapse
from am_diffusers.rewards.parts.hf_files import (
    VIT_L_14,
    check_model_type,
    clip_skeleton,
    download_remedy,
    load_pretrained,
)
from am_diffusers.rewards.parts.preprocess import clip_package_crop

RELEASED_VISION = "openai/clip-vit-large-patch14"
# Of sac+logos+ava1-l14-linearMSE.pth as others report it; no real file was ever seen here.
RELEASED_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HEAD_FILE = "aesthetic_head.safetensors"
DOWNLOAD = (
    "get sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/improved-aesthetic-predictor, or"
    " run `hf download birder-project/aesthetic-predictor openai-clip_aesthetic-predictor.pt`"
)


class Aesthetic(FeatureReward):
    """Aesthetic score of images; about 5.4 for the released head. Build it with `from_pretrained`.

    Args:
        clip: the CLIP model; the text tower isn't used and not kept.
        head: the head on image features of length 1.
        options: settings of the reward.
    """

    name = "aesthetic"
    # The reported sha256 says: the file of Schuhmann's repository under another name.
    released = "birder-project/aesthetic-predictor/openai-clip_aesthetic-predictor.pt"
    column = Column("Aesthetic", 2)

    def __init__(self, clip: CLIPModel, *, head: AffineHead, options: RewardOptions = DIFFERENTIABLE) -> None:
        super().__init__(nn.ModuleList([clip.vision_model, clip.visual_projection]), options=options)
        self._vision_model, self._projection = clip.vision_model, clip.visual_projection
        self._format = clip_format(clip)
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
            path: the head: the released pickle, a safetensors file, the place of one on the hub, or a folder
                with aesthetic_head.safetensors.
            revision: commit of the head on the hub.
            sha256: digest of the head's file; None = the released pickle's, and none for safetensors.
            options: settings of the reward.
            vision: folder or hub id of the CLIP model; by default `path` itself when it is a folder that
                holds one, else openai/clip-vit-large-patch14.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit.
        """
        weights, source = _read_head(path, revision, sha256)
        own = (Path(path) / "config.json").is_file()
        place = str(vision or (path if own else RELEASED_VISION))
        remedy = download_remedy(RELEASED_VISION)
        check_model_type("CLIP", place, None, cls.__name__, remedy)
        clip = load_pretrained(CLIPModel, place, None, cls.__name__, remedy)
        head = collapse(weights, source, clip.visual_projection.out_features)
        return cls(clip, head=head, options=options)

    @classmethod
    def convert(cls, path: str | Path, folder: Path, sha256: str | None) -> None:
        """Write the released head, for instance beside the CLIP model, see `LearnedReward.convert`."""
        weights, source = _read_head(path, None, sha256)
        first = weights.get("layers.0.weight")
        collapse(weights, source, first.shape[-1] if first is not None else 0)
        save_weights(weights, folder / HEAD_FILE)

    @classmethod
    def skeleton(cls, path: str, *, revision: str | None, options: RewardOptions) -> Skeleton:
        """Return the reward without its weights, see `LearnedReward.skeleton`."""
        place, at = (path, revision) if (Path(path) / "config.json").is_file() else (RELEASED_VISION, None)
        clip: Any = clip_skeleton(place, at, {RELEASED_VISION: VIT_L_14})
        vision, projection = clip.vision_model, clip.visual_projection

        def score(pixels: Tensor) -> Tensor:
            return without_text(projection(vision(pixels).pooler_output))  # as cheap as the head

        kept = nn.ModuleList([vision, projection])
        return Skeleton(cls.name, kept, pixels=clip_format(clip).crop, score=score, options=options)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._format.normalise(clip_package_crop(images, self._format.size, self.options.mode))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self._projection(self._vision_model(pixels).pooler_output)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._head(self._features(pixels))


def _read_head(path: str | Path, revision: str | None, sha256: str | None) -> tuple[dict[str, Tensor], str]:
    """Read the layers of the head; return them and the file."""
    place = Path(path) / HEAD_FILE if Path(path).is_dir() else path
    file = find_file(place, revision, DOWNLOAD)
    pinned = None if file.suffix == ".safetensors" else RELEASED_SHA256
    return state_dict_of(read_weights(file, sha256 or pinned, DOWNLOAD), file, DOWNLOAD), str(file)
