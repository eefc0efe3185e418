"""Model families: the components of a Diffusers pipeline as `policy` and `base` velocity fields.

One file a family. Nothing outside this folder names a family or imports models of Diffusers or peft.
"""

from am_diffusers.models.family import Family
from am_diffusers.models.sd3 import SD3

FAMILIES: dict[str, Family] = {
    "StableDiffusion3Pipeline": SD3,
}
"""By `_class_name` in the `model_index.json` of a pipeline folder, which chooses the family."""
