"""Made-up results of an evaluation, for the tests of what is made from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from am_diffusers.prompts.sets import PromptSet
from am_diffusers.rewards import RewardScale
from evaluating.candidates import BASE, Candidate
from evaluating.summary.results import Results
from evaluating.summary.tilt import Target

SETTINGS = {"pretrained_model_name_or_path": "tiny", "sampler": "ode", "seed": 0, "resolution": 64}
BASE_20 = Candidate(BASE, 20)
WEAK, STRONG = (Candidate("lora", 20, lora=Path("lora"), lora_scale=scale) for scale in (0.5, 1.0))
SHIFTS = {BASE_20.key: 0.0, WEAK.key: 0.3, STRONG.key: 1.0}


def make_results(*, seed=0, num_prompts=24, images=4, settings=SETTINGS, shifts=SHIFTS, **changed) -> Results:
    """A base and two scales of a LoRA that raises pickscore by `shifts` and leaves hpsv2 as it is.

    Categories: `kind` in turn animal, thing and none; features shrink towards their mean with the shift.
    """
    rng = np.random.default_rng(seed)
    shape = (num_prompts, images)
    base = {"hpsv2": rng.normal(0.28, 0.01, shape), "pickscore": rng.normal(21, 1, shape)}
    look = rng.normal(size=(*shape, 6))
    scores, features, path_kl = {}, {}, {}
    for key, shift in shifts.items():
        noise = 0.0 if shift == 0 else rng.normal(0, 0.2, shape)
        scores[key] = {"hpsv2": base["hpsv2"] + 0.01 * noise, "pickscore": base["pickscore"] + shift + noise}
        features[key] = {"clip": look + shift * (look.mean(axis=1, keepdims=True) - look) / 2}
        path_kl[key] = np.full(shape, 3.0 * shift)
    kinds = tuple(("animal", "thing", "")[row % 3] for row in range(num_prompts))
    results = Results(
        folder=Path("unused"),
        settings=settings,
        prompts=PromptSet(tuple(f"prompt {row}" for row in range(num_prompts)), {"kind": kinds}),
        candidates=(BASE_20, WEAK, STRONG),
        scores=scores,
        features=features,
        reference_features={},
        path_kl={key: kl for key, kl in path_kl.items() if key != BASE_20.key},
        changes={},
    )
    return replace(results, **changed)


TARGET = Target(0.6, {"pickscore": RewardScale(2.0, 21.0, 1.0)})
DEVIATION = 0.7
"""Of pickscore within a prompt: the weighted sum has 2 * .7, so the scale is .84 of one over it."""


def make_tilted(share=1.0, *, num_prompts=64, images=64, seed=0, target=TARGET, **changed) -> Results:
    """Pickscore is normal, each prompt with a mean of its own; hpsv2 is a third of it and noise.

    The tuned model has the `share` of the tilt's shift, for the path KL that the best control pays for it:
    that of share 1 is the tilt.
    """
    rng = np.random.default_rng(seed)
    shape = (num_prompts, images)
    means = 21 + rng.normal(size=(num_prompts, 1))
    base = {"pickscore": means + DEVIATION * rng.normal(size=shape)}
    base["hpsv2"] = (base["pickscore"] - means) / 3 + 0.1 * rng.normal(size=shape)
    shift = share * target.scale * target.rewards["pickscore"].weight * DEVIATION**2
    tuned = {"pickscore": base["pickscore"] + shift, "hpsv2": base["hpsv2"] + shift / 3}
    path_kl = np.full(shape, shift**2 / (2 * DEVIATION**2))
    return make_results(
        num_prompts=num_prompts,
        images=images,
        candidates=(BASE_20, STRONG),
        scores={BASE_20.key: base, STRONG.key: tuned},
        features={},
        path_kl={STRONG.key: path_kl},
        trained={"lora": ("pickscore",)},
        targets={"lora": target},
        **changed,
    )
