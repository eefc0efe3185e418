"""Synthetic results of an evaluation, with pictures on disk, for the tests of the report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from am_diffusers.prompts.sets import PromptSet
from am_diffusers.rewards import RewardScale
from evaluating.candidates import BASE, Candidate
from evaluating.summary.results import Results
from evaluating.summary.tilt import Target

HOSTILE = (
    """</script><script>window.hacked = 1</script> "quoted" 'fox' """
    """<img src=x onerror="window.hacked = 1"> {{ 7 * 7 }}"""
)
REWARDS = ("pickscore", "hpsv2")


def candidates(scales=(1.0,), steps=8):
    """The base and a LoRA at some scales."""
    tuned = tuple(Candidate("mine", steps, 1.0, Path("mine"), scale) for scale in scales)
    return (Candidate(BASE, steps), *tuned)


def synthetic_results(
    folder: Path, prompts, compared, *, num_images=2, categories=None, path_kl=False, side=16
) -> Results:
    """Results whose first reward rises and whose second falls with the scale of the LoRA; seeded."""
    rng = np.random.default_rng(0)
    shape = (len(prompts), num_images)
    quality = {reward: rng.normal(20, 2, shape) for reward in REWARDS}
    directions = rng.normal(size=(*shape, 8))
    scores, features = {}, {}
    for candidate in compared:
        strength = 0.0 if candidate.is_base else candidate.lora_scale
        scores[candidate.key] = {
            reward: quality[reward] + strength * (sign + rng.normal(0, 1, shape))
            for reward, sign in zip(REWARDS, (1, -1), strict=True)
        }
        features[candidate.key] = {"clip": directions + 0.5 * strength}
    results = Results(
        folder,
        {"pretrained_model_name_or_path": "owner/model", "sampler": "ode", "seed": 0, "resolution": side},
        PromptSet(tuple(prompts), categories or {}),
        tuple(compared),
        scores,
        features,
        {},
        {c.key: rng.gamma(9, c.lora_scale, shape) for c in compared if path_kl and not c.is_base},
        {},
    )
    draw_pictures(results, side)
    return results


def tilted_results(folder: Path, prompts, shares, *, targets=None, num_images=32) -> Results:
    """Results of one LoRA a share of the tilt's shift, named by it; pickscore is trained and normal.

    Each costs what the best control would pay for it; `targets` of other runs are by the name of the LoRA.
    """
    target = Target(0.4, {"pickscore": RewardScale()})
    tuned = [Candidate(f"share{share:g}", 8, 1.0, Path(f"/runs/{share:g}/lora")) for share in shares]
    results = synthetic_results(
        folder, prompts, (Candidate(BASE, 8), *tuned), num_images=num_images, path_kl=True, side=4
    )
    base = results.scores[results.candidates[0].key]
    scores, path_kl = {results.candidates[0].key: base}, {}
    for candidate, share in zip(tuned, shares, strict=True):
        shift = share * target.scale * 2**2
        scores[candidate.key] = {"pickscore": base["pickscore"] + shift, "hpsv2": base["hpsv2"] - 0.1}
        path_kl[candidate.key] = np.full(base["pickscore"].shape, (shift / 2) ** 2 / 2)
    names = {candidate.name: target for candidate in tuned} | (targets or {})
    trained = {name: tuple(each.rewards) for name, each in names.items()}
    return replace(results, scores=scores, path_kl=path_kl, targets=names, trained=trained)


def colour(candidate, prompt, image):
    """Of a candidate's picture: every one has its own."""
    return (40 * candidate % 256, 7 * prompt % 256, 100 * image % 256)


def draw_pictures(results: Results, side: int) -> None:
    """Plain pictures of side x side pixels."""
    shape = next(iter(results.scores[results.candidates[0].key].values())).shape
    for place, candidate in enumerate(results.candidates):
        for prompt, image in np.ndindex(shape):
            file = results.image(candidate, prompt, image)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), colour(place, prompt, image)).save(file)
