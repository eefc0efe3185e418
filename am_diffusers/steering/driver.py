"""An optimisation from plan to results: images and what they start from, scores, the table."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from am_diffusers.evaluation.images import PURPOSE, ImageId, image_ids
from am_diffusers.evaluation.pairs import official
from am_diffusers.models.base import Model
from am_diffusers.noise import LatentSpec, generator_for
from am_diffusers.rewards import (
    FixedReward,
    LearnedReward,
    Reward,
    RewardOptions,
    RewardScale,
    WeightedRewards,
)
from am_diffusers.run.fields import guided
from am_diffusers.run.load import open_reward
from am_diffusers.steering.ascent import STEP_SIZES, Ascent
from am_diffusers.steering.chain import Chain
from am_diffusers.steering.plan import Plan
from am_diffusers.steering.results import BASE, RESULTS, Candidate, Folder, stem, table_of
from am_diffusers.system.files import write_json
from am_diffusers.transitions import TRANSITIONS, Transitions
from am_diffusers.velocity import Conditioning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Workshop:
    """The loaded parts of an optimisation.

    Attributes:
        plan: what to make.
        model: pipeline with its LoRA.
        reward: weighted sum of the climbed rewards.
        judges: climbed and held-out rewards as they are published.
        latents: shape and device of the latents.
        folder: where images go.
    """

    plan: Plan
    model: Model
    reward: WeightedRewards
    judges: tuple[Reward, ...]
    latents: LatentSpec
    folder: Folder

    def chain(self, which: Sequence[ImageId]) -> Chain:
        """Return the sampler of images, with the noise of their steps if it has any."""
        options = self.plan.options
        sigmas = self.model.ode_sigmas if options.sampler == "ode_euler" else self.model.sde_sigmas
        transitions = TRANSITIONS[options.sampler](sigmas(options.num_inference_steps, self.latents.shape))
        return Chain(
            guided(self.model.policy, options.guidance_scale),
            transitions,
            self.reward_of_latents,
            options.gradient,
            options.gradient_steps,
            frozen_noise(options.seed, which, self.latents, transitions),
            branches=1 if options.guidance_scale == 1 else 2,
        )

    def reward_of_latents(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the weighted sum of the climbed rewards of latents, (B,)."""
        values = self.reward(self.model.decode(latents), prompts)
        self.reward.drain()
        return values

    def cond(self, which: Sequence[ImageId]) -> Conditioning:
        """Encode the prompts of images."""
        options = self.plan.options
        return self.model.encode_prompts(
            [self.plan.prompts[image.prompt] for image in which],
            max_sequence_length=self.plan.max_sequence_length,
            negative_prompt=None if options.guidance_scale == 1 else "",
        )

    def noise(self, which: Sequence[ImageId]) -> Tensor:
        """Draw the starting noise of images, that of evaluations."""
        seed = self.plan.options.seed
        return self.latents.draw([generator_for(seed, PURPOSE, *image) for image in which])

    @torch.no_grad()
    def keep(self, candidate: Candidate, which: Sequence[ImageId], final: Tensor) -> None:
        """Decode, write and score images."""
        images = self.model.decode(final)
        self.folder.save(candidate.name, which, images)
        prompts = [self.plan.prompts[image.prompt] for image in which]
        candidate.add(which, {judge.name: judge(images, prompts).tolist() for judge in self.judges})


def frozen_noise(
    seed: int, which: Sequence[ImageId], latents: LatentSpec, transitions: Transitions
) -> Callable[[int], Tensor] | None:
    """Return the noise of steps as evaluations draw it, the same at every call; None for an ODE."""
    if not transitions.std.any():
        return None
    generators = [generator_for(seed, PURPOSE, *image, "steps") for image in which]
    drawn = [latents.draw(generators) for _ in range(transitions.num_steps - 1)]
    return drawn.__getitem__


def load(plan: Plan, device: torch.device) -> Workshop:
    """Load pipeline and rewards.

    Raises:
        ValueError: weights are missing or don't fit, or a reward can't score a prompt.
    """
    options = plan.options
    opened = partial(RewardOptions, device=device)
    climbed: list[Reward] = [open_reward(each, opened()) for each in plan.rewards]
    held_out = [open_reward(each, opened(mode="official")) for each in plan.held_out]
    for reward in [*climbed, *held_out]:
        if isinstance(reward, LearnedReward | FixedReward):
            reward.check_can_score(plan.prompts)
    model = Model.from_pretrained(plan.source, weight_dtype=DTYPES[options.dtype], device=device)
    if options.lora is not None:
        model.load_lora(options.lora, scale=options.lora_scale)
    scales = [RewardScale(each.weight, each.mean, each.std) for each in plan.rewards]
    return Workshop(
        plan,
        model,
        WeightedRewards(climbed, scales),
        (*map(official, climbed), *held_out),
        LatentSpec(model.latent_shape(plan.side, plan.side), model.device),
        Folder(options.output, options.num_inference_steps, options.guidance_scale),
    )


def batches(plan: Plan) -> list[list[ImageId]]:
    """Return the images, those of one prompt `batch_size` at a time."""
    which, size = image_ids(len(plan.prompts), plan.options.num_images), plan.options.batch_size
    of_prompts = [[image for image in which if image.prompt == prompt] for prompt in range(len(plan.prompts))]
    return [images[start : start + size] for images in of_prompts for start in range(0, len(images), size)]


def optimize(shop: Workshop) -> Iterator[str]:
    """Make base, optimised and best-of images; yield lines to print, the table last.

    Raises:
        NonFiniteError: if a start has no finite reward; everything made before is kept.
    """
    plan, options = shop.plan, shop.plan.options
    base = Candidate(BASE)
    steered = Candidate(f"{options.optimize}-{options.gradient}") if options.optimize else None
    best = Candidate(f"best_of_{options.best_of}") if options.best_of else None
    made = [each for each in (base, steered, best) if each is not None]
    rounds = options.iterations + 1 if steered else 1
    with tqdm(total=len(batches(plan)) * rounds, desc="iterations", disable=None) as bar:
        for which in batches(plan):
            if steered is not None:
                yield from _climb(shop, which, base, steered, bar)
            else:
                _base(shop, which, base)
                bar.update()
            if best is not None:
                _best_of(shop, which, best)
    roles = {each.name: "climbed" for each in plan.rewards} | {
        each.name: "held-out" for each in plan.held_out
    }
    write_results(shop, made)
    yield from table_of(made, roles)
    yield f"images, inputs and {RESULTS}: {options.output.resolve()}"


def write_results(shop: Workshop, made: Sequence[Candidate]) -> None:
    """Write settings and numbers."""
    values = asdict(shop.plan.options)
    document = {
        "settings": {name: str(each) if isinstance(each, Path) else each for name, each in values.items()},
        "prompts": list(shop.plan.prompts),
        "candidates": [candidate.to_dict() for candidate in made],
    }
    write_json(shop.folder.root / RESULTS, document)


def _climb(
    shop: Workshop, which: Sequence[ImageId], base: Candidate, steered: Candidate, bar: Any
) -> Iterator[str]:
    options = shop.plan.options
    assert options.optimize is not None
    size = options.step_size or STEP_SIZES[options.optimize]
    ascent = Ascent(options.optimize, options.iterations, size, options.radius)

    def tell(rewards: Tensor) -> None:
        bar.set_postfix(reward=f"{rewards.mean().item():.4g}")
        bar.update()

    started, chain = time.monotonic(), shop.chain(which)
    found = ascent.run(chain, shop.cond(which), shop.noise(which), tell)
    steered.seconds += time.monotonic() - started
    steered.passes = max(steered.passes, chain.passes)
    base.passes = chain.branches * chain.transitions.num_steps
    shop.keep(base, which, found.base)
    shop.keep(steered, which, found.final)
    moved = options.optimize == "embeddings"
    shop.folder.save_inputs(steered.name, which, found.noise, found.cond, embeddings=moved)
    for row, image in enumerate(which):
        steered.details.setdefault("traces", {})[stem(image)] = {  # type: ignore[index]
            "rewards": found.trace[:, row].tolist(),
            "best_iteration": int(found.iterations[row]),
        }
    if found.stopped is not None:
        steered.notes.append(f"{which[0].prompt:05d}: {found.stopped}")
        yield f"{found.stopped}; the best so far is kept"


def _base(shop: Workshop, which: Sequence[ImageId], base: Candidate) -> None:
    chain, started = shop.chain(which), time.monotonic()
    end = chain.end(shop.cond(which), shop.noise(which))
    base.seconds += time.monotonic() - started
    base.passes = chain.passes
    shop.keep(base, which, end.final)


def _best_of(shop: Workshop, which: Sequence[ImageId], best: Candidate) -> None:
    """Keep the best of an image's own noise and others."""
    options, started = shop.plan.options, time.monotonic()
    assert options.best_of is not None
    chain, cond = shop.chain(which), shop.cond(which)
    noise = shop.noise(which)
    end = chain.end(cond, noise)
    for number in range(1, options.best_of):
        other = shop.latents.draw([generator_for(options.seed, "best_of", *image, number) for image in which])
        tried = chain.end(cond, other)
        better = tried.rewards > end.rewards
        rows = better.view(-1, *[1] * (noise.ndim - 1))
        noise = torch.where(rows, other, noise)
        end = end._replace(
            final=torch.where(rows, tried.final, end.final),
            rewards=torch.where(better, tried.rewards, end.rewards),
        )
    best.seconds += time.monotonic() - started
    best.passes = chain.passes
    shop.keep(best, which, end.final)
    shop.folder.save_inputs(best.name, which, noise, cond, embeddings=False)
